"""``kvmerge chat``: a conversation in the terminal, with pictures."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .number import MOST_THREADS, MOST_TOKENS, Whole, cap, kept_or_measured, temperature
from .picture_options import add_picture_options, check_picture_options, picture_options

if TYPE_CHECKING:
    from ..llama import Llama
    from ..progress import ReadingProgress

_HELP = """\
  /image FILE ...  show pictures (or sounds) with the next message
  /stats           what the cache holds
  /save FILE       keep the conversation: FILE is the cache, FILE.json what was said
  /load FILE       go on from one that was kept
  /reset           forget everything
  /help            this
  /quit            leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""

_SOUNDS = (".wav", ".mp3", ".flac")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", metavar="MODEL", help="model (GGUF)")
    parser.add_argument("--mmproj", help="its vision or audio part (GGUF)")
    parser.add_argument("--kv-merge", default="auto", help="how the cache is merged, or none")
    parser.add_argument(
        "--kv-budget",
        type=kept_or_measured,
        default=0.2,
        help="what is kept: a fraction such as 0.2, a number of cells, or auto",
    )
    parser.add_argument("--kv-max-cells", type=cap, help="the most cells, or bytes such as 512MiB")
    add_picture_options(parser)
    parser.add_argument("--n-ctx", type=Whole(0, MOST_TOKENS), default=8192, help="context length")
    parser.add_argument("--threads", type=Whole(1, MOST_THREADS), help="threads to compute with")
    parser.add_argument(
        "--n-gpu-layers", type=Whole(-1, MOST_TOKENS, "-1 is all"), default=0, help="on the GPU"
    )
    parser.add_argument(
        "--temperature", type=temperature, default=0.2, help="0 is always the likeliest"
    )
    parser.add_argument(
        "--max-tokens",
        type=Whole(1, MOST_TOKENS),
        help="the longest answer; default: what fits",
    )
    parser.add_argument("--system", help="what the model is told first")


class Interrupt:
    """Ctrl-C: ends a line that is being typed, and else is noted, for where nothing is half done.

    From `caught` on it never ends the program. What is asked for between a line and its answer
    stops that answer.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._is_typing = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note Ctrl-C inside instead of raising; one after another that was noted raises."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def typed(self, prompt: str) -> str:
        """Return what is typed in one line.

        Raises
        ------
        KeyboardInterrupt
            At Ctrl-C, as nothing is done meanwhile.
        EOFError
            If the input has ended.
        """
        self.is_asked = False
        self._is_typing = True
        try:
            return input(prompt)
        finally:
            self._is_typing = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked or self._is_typing:
            self.is_asked = self._is_typing = False  # What catches it is not to be interrupted too.
            raise KeyboardInterrupt
        self.is_asked = True


class Watch:
    """Shows how far reading is, where there is a terminal, and stops it at an interrupt.

    Parameters
    ----------
    interrupt : Interrupt
        What stops it.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        from ..progress import Bar

        self._interrupt = interrupt
        self._bar = Bar() if sys.stderr is not None and sys.stderr.isatty() else None

    def __call__(self, progress: ReadingProgress) -> bool:
        """Show it; False is to stop."""
        if self._bar is not None:
            self._bar(progress)
        return not self._interrupt.is_asked

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _load(interrupt: Interrupt, arguments: argparse.Namespace) -> Llama:
    from ..llama import Llama

    check_picture_options(arguments)
    options = picture_options(arguments)
    if arguments.threads is not None:
        options |= {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    merging = arguments.kv_merge.lower() != "none"
    return Llama(
        arguments.model,
        mmproj=arguments.mmproj,
        kv_merge=arguments.kv_merge if merging else None,
        kv_budget=arguments.kv_budget,
        kv_max_cells=arguments.kv_max_cells and arguments.kv_max_cells.limit,
        n_ctx=arguments.n_ctx,
        n_gpu_layers=arguments.n_gpu_layers,
        verbose=False,
        progress=Watch(interrupt),
        **options,
    )


class Conversation:
    """What was said, and the model that goes on with it.

    Parameters
    ----------
    llm : Llama
        The model.
    interrupt : Interrupt
        What stops an answer.
    options : dict
        Options of `Llama.create_chat_completion`.
    system : str, optional
        What the model is told first.
    """

    def __init__(
        self, llm: Llama, interrupt: Interrupt, options: dict[str, Any], system: str | None
    ) -> None:
        self._llm = llm
        self._interrupt = interrupt
        self._options = options
        self._system = system
        self.messages: list[dict[str, Any]] = self._first()
        self.shown: list[dict[str, Any]] = []

    def _first(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says.

        Raises
        ------
        KVMergeError
            If it cannot be done.
        """
        from ..errors import OptionError

        name, _, rest = line[1:].partition(" ")
        try:
            words = [rest.strip()] if name in ("save", "load") and rest else shlex.split(rest)
        except ValueError as error:
            raise OptionError(f"/{name}: {error}") from None
        commands = {
            "image": self.image,
            "stats": self.stats,
            "save": self.save,
            "load": self.load,
            "reset": self.reset,
            "help": lambda: print(_HELP),
        }
        if name not in commands:
            raise OptionError(f"there is no /{name}: /help lists what there is")
        if name in ("image", "save", "load") and not words:
            raise OptionError(f"/{name} needs the name of a file")
        if name in ("stats", "reset", "help") and words:
            raise OptionError(f"/{name} takes nothing after it")
        commands[name](*words)

    def image(self, *names: str) -> None:
        """Show pictures or sounds with the next message."""
        from ..errors import MediaError

        files = [Path(name).expanduser().resolve() for name in names]
        for file in files:
            if not file.is_file():
                raise MediaError(f"there is no file {file}")
        for file in files:
            kind = "audio" if file.suffix.lower() in _SOUNDS else "image"
            self.shown.append({"type": kind, kind: os.fspath(file)})
        print(f"{len(self.shown)} to be shown with the next message")

    def stats(self) -> None:
        """Print what the cache holds."""
        print(self._llm.kv_stats())

    def reset(self) -> None:
        """Forget everything."""
        self._llm.reset()
        self.messages, self.shown = self._first(), []
        print("forgotten")

    def save(self, name: str) -> None:
        """Keep the cache and what was said."""
        from ..errors import StateError

        file = Path(name).expanduser()
        self._llm.save_context(file)
        try:
            _said(file).write_text(json.dumps(self.messages, indent=1), encoding="utf-8")
        except OSError as error:
            raise StateError(f"{_said(file)} cannot be written: {error.strerror}") from error
        print(f"kept in {file} ({file.stat().st_size / 2**20:.1f} MiB) and {_said(file)}")

    def load(self, name: str) -> None:
        """Go on from a conversation that was kept."""
        from ..chat.messages import check_messages
        from ..errors import StateError

        file = Path(name).expanduser()
        try:
            messages = json.loads(_said(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StateError(f"{_said(file)} cannot be read: {error}") from error
        check_messages(messages)
        self._llm.load_context(file)
        self.messages, self.shown = messages, []
        print(f"{len(messages)} messages, {self._llm.n_tokens} tokens")

    def say(self, text: str) -> None:
        """Send a message and print the answer as it comes.

        Raises
        ------
        KVMergeError
            If there is no answer; the message is then not part of the conversation.
        """
        from ..errors import StoppedError

        content: Any = [*self.shown, {"type": "text", "text": text}] if self.shown else text
        self.messages.append({"role": "user", "content": content})
        said: list[str] = []
        try:
            self._answer(said)
            if self._interrupt.is_asked:
                print("[stopped]", end="")
        except StoppedError:
            print("[stopped]", end="")
        except BaseException:
            if not said:
                self.messages.pop()
                raise
            print()
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
                self.shown = []
        if not said and self.messages[-1]["role"] == "user":
            self.messages.pop()
        print()

    def _answer(self, said: list[str]) -> None:
        chunks = self._llm.create_chat_completion(self.messages, stream=True, **self._options)
        try:
            for chunk in chunks:
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    piece = piece if said else piece.lstrip()
                    said.append(piece)
                    print(piece, end="", flush=True)
                if self._interrupt.is_asked:
                    break
        finally:
            chunks.close()


def _said(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _message(interrupt: Interrupt) -> str:
    """Return what is typed, which may be several lines."""
    asks = sys.stdin.isatty()
    whole = ""
    while True:
        line = interrupt.typed(("... " if whole else "> ") if asks else "")
        if not line.endswith("\\"):
            return (whole + line).strip()
        whole += line[:-1] + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from ..errors import KVMergeError
    from ..terminal import complain

    interrupt = Interrupt()
    options = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    with _load(interrupt, arguments) as llm, interrupt.caught():
        conversation = Conversation(llm, interrupt, options, arguments.system)
        print("/help lists what there is beside talking.")
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (input() then edits, and remembers what was typed)
        while True:
            line = ""
            try:
                line = _message(interrupt)
                if line in ("/quit", "/exit"):
                    break
                if line.startswith("/"):
                    conversation.command(line)
                elif line:
                    conversation.say(line)
            except EOFError:
                if sys.stdin.isatty():
                    print()
                break
            except KVMergeError as error:
                complain(f"{error}")
            except KeyboardInterrupt:
                print("\n[stopped]" if line else "\n(Ctrl-D or /quit leaves)")
    return 0
