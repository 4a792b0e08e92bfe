"""What a person sees of a sweep, and how they stop it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Set by a first Ctrl-C, while a second one is Python's own; in the main thread alone."""
    event, mine = threading.Event(), threading.current_thread() is threading.main_thread()
    if not mine:
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bar(total: int, start: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function to call after each step; tqdm's bar, where that is installed, else lines."""
    if not shown:
        yield lambda text: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        step = start

        def tell(text: str) -> None:
            nonlocal step
            step += 1
            print(f"step {step} of {total}: {text}", file=sys.stderr)

        yield tell
        return
    with tqdm(total=total, initial=start, desc="sweep") as shown_bar:

        def advance(text: str) -> None:
            shown_bar.set_postfix_str(text, refresh=False)
            shown_bar.update()

        yield advance
