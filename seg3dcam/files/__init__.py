"""Files of all kinds: how they are named, written and read.

`writing` makes files that are complete or not there at all, and `names` finds names for them.
`readers` and `series` read scans, whichever program made them. `writers` write volumes that lie
exactly on their scan.
"""

from seg3dcam.files.names import printable, shortened, unique_names, visible
from seg3dcam.files.writing import (
    as_path,
    atomic,
    check_writable,
    digest_of,
    digest_of_all,
    in_scratch,
    plain,
    read_small,
    remove_scratch_left_behind,
    resolved,
    scratch_folder,
    temporary_name,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "as_path",
    "atomic",
    "check_writable",
    "digest_of",
    "digest_of_all",
    "in_scratch",
    "plain",
    "printable",
    "read_small",
    "remove_scratch_left_behind",
    "resolved",
    "scratch_folder",
    "shortened",
    "temporary_name",
    "unique_names",
    "visible",
    "write_bytes",
    "write_json",
    "write_text",
]
