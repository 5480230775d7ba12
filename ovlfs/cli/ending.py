"""What should a verb do when it is told to end while it makes something?"""

import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_in_order() -> None:
    """From now on SIGTERM and SIGHUP are what Ctrl-C is: a KeyboardInterrupt, so that what was begun is taken away.

    A signal that our starter has us ignore (nohup) stays ignored.
    """
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    for number in _ENDING:  # what is taken away now shall not be disturbed by another signal
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
