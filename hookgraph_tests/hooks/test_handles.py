from collections.abc import Callable

import pytest

from hookgraph.hooks.handles import installed


class Bench:
    """Something on which handles are installed; keeps a log."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def installer(self, name: str, *, fails: bool = False, stuck: bool = False) -> Callable[[], "Peg"]:
        def install() -> "Peg":
            if fails:
                raise ValueError(f"cannot install {name}")
            self.log.append(f"+{name}")
            return Peg(self, name, stuck)

        return install


class Peg:
    def __init__(self, bench: Bench, name: str, stuck: bool) -> None:
        self.bench, self.name, self.stuck = bench, name, stuck

    def remove(self) -> None:
        self.bench.log.append(f"-{self.name}")
        if self.stuck:
            raise OSError(f"{self.name} is stuck")


def test_what_is_installed_is_removed_once_in_reverse_order():
    bench = Bench()
    with installed(*(bench.installer(name) for name in "abc")):
        assert bench.log == ["+a", "+b", "+c"]
    assert bench.log == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_everything_is_removed_when_the_body_raises():
    bench = Bench()
    with (
        pytest.raises(ZeroDivisionError, match="body"),
        installed(bench.installer("a"), bench.installer("b")),
    ):
        raise ZeroDivisionError("body")
    assert bench.log == ["+a", "+b", "-b", "-a"]


def test_what_came_before_a_failing_installer_is_removed():
    bench = Bench()
    installers = (bench.installer("a"), bench.installer("b", fails=True), bench.installer("c"))
    with pytest.raises(ValueError, match="cannot install b"), installed(*installers):
        pytest.fail("the body must not run")
    assert bench.log == ["+a", "-a"]


def test_a_removal_that_fails_does_not_keep_the_others():
    bench = Bench()
    installers = (bench.installer("a"), bench.installer("b", stuck=True), bench.installer("c"))
    with pytest.raises(OSError, match="b is stuck"), installed(*installers):
        pass
    assert bench.log == ["+a", "+b", "+c", "-c", "-b", "-a"]
