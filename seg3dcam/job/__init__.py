"""One case as a job: what is asked for, what is written, and by what it is known again."""
