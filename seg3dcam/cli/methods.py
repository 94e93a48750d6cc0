"""`seg3dcam methods`: what each method is, from the docstring of its class."""

from __future__ import annotations

from rich.padding import Padding

from seg3dcam.cams.method_cards import method_cards
from seg3dcam.cli.printing import out, shown


def methods() -> None:
    """List the methods: formula, paper, cost, what is class-specific, what is undefined."""
    for key, card in method_cards().items():
        out.print(f"[bold]{key}[/bold]  {shown(card['Summary'])}")
        for name, text in card.items():
            if name != "Summary":
                style = "dim" if name == "Paper" else "none"
                line = Padding(f"{name}: {shown(text)}", (0, 0, 0, 4), style=style, expand=False)
                out.print(line)
