"""`daco chat`: a conversation in a terminal, or of lines from a pipe; commands begin with a slash.

Reads lines of text from standard input and images by path; writes answers to standard output.
"""

import contextlib
import difflib
import sys
from collections.abc import Callable
from typing import Any

from daco.cli import show
from daco.cli.base_model import open_image
from daco.cli.conversation import Answer, Conversation
from daco.errors import DacoError
from daco.steering import SCOPES

HELP = f"""\
/image PATH   show the model an image with your next message, or several
/on, /off     steer the answers, or leave them as they are
/gamma X      strength of the shift towards desirable concepts
/eta X        cosine threshold of labels
              ('default' in place of X takes the release's)
/scope S      where to steer: {", ".join(SCOPES)}
/atoms        all atoms that were removed for the last answer
/report       everything that steering did for the last answer
/again        answer your last message anew, say after /off
/reset        forget the conversation
/help         these lines
/quit         leave, as does ctrl-D; ctrl-C stops an answer"""

SHOWN = 5
"""Concepts named after an answer."""

ATOM_COLUMNS = ("layer", "atom", "concepts", "positions", "strength")


class Chat:
    """A conversation with its commands.

    Args:
        conversation: With the model.
        as_json: Print one line of JSON a turn instead of text.
    """

    def __init__(self, conversation: Conversation, as_json: bool) -> None:
        self.talk, self.as_json = conversation, as_json
        self.last: Answer | None = None
        self.shown: list[str] = []
        self.failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "on": lambda _: self._set("steering is on", on=True),
            "off": lambda _: self._set("steering is off", on=False),
            "gamma": lambda text: self._number("gamma", text),
            "eta": lambda text: self._number("eta", text),
            "scope": self._scope,
            "atoms": lambda _: self._atoms(),
            "report": lambda _: self._report(),
            "again": lambda _: self._again(),
            "reset": lambda _: self._reset(),
            "help": lambda _: self._note(HELP),
        }

    def line(self, text: str) -> bool:
        """Do what a line says; returns whether to go on. Errors are printed, and the talk goes on."""
        text = text.strip()
        name, _, rest = text[1:].partition(" ")
        if text in ("/quit", "/exit"):
            return False
        try:
            if text.startswith("/"):
                self._command(name, rest.strip())
            elif text:
                self._answer(text)
        except (DacoError, ValueError) as error:
            self.failed = True
            show.as_json({"error": show.one_line(error)}) if self.as_json else show.fail(error)
        return True

    def _command(self, name: str, rest: str) -> None:
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            raise ValueError(
                f"expected a command that /help lists, got /{name}" + (f"; /{near[0]}?" if near else "")
            )
        self.commands[name](rest)

    def _answer(self, text: str) -> None:
        answer = self.talk.say(text, self._stream)
        images, self.shown = self.shown, []  # where the answer is stopped, they wait for the next message
        self._print(text, images, answer)

    def _again(self) -> None:
        if self.talk.said and not self.as_json:
            show.say(f"again: {show.plain(self.talk.said[0])}", style="dim")
        text, answer = self.talk.again(self._stream)
        self._print(text, [], answer)

    @property
    def _stream(self) -> Callable[[str], None] | None:
        return None if self.as_json else _write

    def _print(self, text: str, images: list[str], answer: Answer) -> None:
        self.last = answer
        if self.as_json:
            show.as_json(self._facts(text, images, answer))
            return
        show.say()
        show.say(self._summary(answer), style="dim")

    def _facts(self, text: str, images: list[str], answer: Answer) -> dict[str, Any]:
        settings = self.talk.settings
        found = {"text": text, "images": images, "answer": answer.text, "steered": settings.on}
        if not answer.report:
            return found
        named = {"method": answer.report.method, "scope": answer.report.scope, "notes": answer.report.notes}
        return found | named | {"positions": answer.report.positions, "atoms": _atom_rows(answer)}

    def _summary(self, answer: Answer) -> str:
        if answer.report is None:
            return "[not steered]"
        names = list(dict.fromkeys(_first(atom.names) for _, atom in answer.atoms))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        removed = f"removed {', '.join(names[:SHOWN])}{more}" if names else "no undesirable atom fired"
        shifted = "; shifted to the desirable" if any(x.shifted for x in answer.report.layers) else ""
        tokens = max((sum(layer.positions.values()) for layer in answer.report.layers), default=0)
        return f"[steered {tokens} tokens: {removed}{shifted}]"

    def _image(self, path: str) -> None:
        if not path:
            raise ValueError("/image: expected a path, got none")
        self.talk.pending.append(open_image(path))
        self.shown.append(path)
        width, height = self.talk.pending[-1].size
        self._note(f"{path}, {width} x {height}, goes with your next message")

    def _set(self, said: str, **changes: Any) -> None:
        self.talk.set(**changes)
        self._note(said)

    def _number(self, name: str, text: str) -> None:
        if text in ("", "default"):
            self._set(f"{name} is the release's", **{name: None})
            return
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"/{name}: expected a number or 'default', got {text!r}") from None
        self._set(f"{name} is {value:g}", **{name: value})

    def _scope(self, text: str) -> None:
        if text not in SCOPES:
            raise ValueError(f"/scope: expected one of {', '.join(SCOPES)}, got {text!r}")
        self._set(f"scope is {text}", scope=text)

    def _atoms(self) -> None:
        if self.last is None or self.last.report is None:
            self._note(_unsteered(self.last))
        elif self.as_json:
            show.as_json({"atoms": _atom_rows(self.last)})
        elif rows := _atom_rows(self.last):
            show.table(rows, ATOM_COLUMNS)
        else:
            self._note("no undesirable atom fired")

    def _report(self) -> None:
        if self.last is None or self.last.report is None:
            self._note(_unsteered(self.last))
        elif self.as_json:
            show.as_json(self.last.report.as_dict())
        else:
            self._note(show.plain(self.last.report, lines=True))

    def _reset(self) -> None:
        self.talk.reset()
        self.last, self.shown = None, []
        self._note("starting anew")

    def _note(self, text: str) -> None:
        if self.as_json:
            show.as_json({"note": text})
        else:
            show.say(show.plain(text, lines=True), style="dim")


def _unsteered(last: Answer | None) -> str:
    return "no answer was steered yet" if last is None else "the last answer was not steered"


def _first(names: list[str]) -> str:
    return show.plain(names[0]) if names else "unnamed"


def _atom_rows(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "atom": atom.atom, "concepts": list(atom.names[:3])}
        | {"positions": atom.positions, "strength": round(atom.mean_strength, 4)}
        for layer, atom in answer.atoms
    ]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run_terminal(chat: Chat) -> None:
    """Talk with a person until they leave; ctrl-C stops an answer."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history
    while True:
        try:
            text = input("\n> ")
        except EOFError:
            show.say()
            return
        except KeyboardInterrupt:
            show.say("\nctrl-D leaves", style="dim")
            continue
        try:
            if not chat.line(text):
                return
        except KeyboardInterrupt:
            kept = "; its images go with your next message" if chat.shown else ""
            show.say(f"\n[stopped; this turn is forgotten{kept}]", style="dim")


def run_lines(chat: Chat) -> int:
    """Take turns from a pipe until it ends; returns the exit code: 1 where a turn failed."""
    for text in sys.stdin:
        if not chat.line(text):
            break
    return int(chat.failed)
