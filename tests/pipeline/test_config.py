from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, create_model, field_validator, model_validator

from pipeline.config import ConfigError, Settings, dump, explain, fault, load


class Inner(Settings):
    """A section."""

    operational: ClassVar[frozenset[str]] = frozenset({"threads"})

    cap: int = Field(default=20, gt=0)
    """Pairs a query."""
    threads: int = 4
    """How many at once."""

    @model_validator(mode="after")
    def _fits(self) -> Inner:
        if self.threads > 64 * self.cap:
            raise fault("too many for the cap", "threads", "cap")
        return self


class Size(Settings):
    """One kind of width."""

    pixels: int = 224
    """Of the picture."""


class Outer(Settings):
    """A configuration."""

    balance: Inner = Inner()
    """The cap."""
    extra: Inner | None = None
    """More of it."""
    rate: float = 1.0
    """A number."""
    name: str = ""
    """A word."""
    files: tuple[str, ...] = ()
    """Paths."""
    width: Annotated[int, Field(gt=0)] | Literal["auto"] | Size | None = None
    """One of several kinds."""
    named: dict[str, Inner] = Field(default_factory=dict)
    """More caps, by name."""

    @field_validator("name")
    @classmethod
    def _is_written_out(cls, name: str) -> str:
        if name == "?":
            raise ValueError("write it out")
        return name

    @model_validator(mode="after")
    def _is_known(self) -> Outer:
        if "wrogn" in self.named:
            raise fault("did you mean 'wrong'?", "named.wrogn")
        if "none" in self.named:
            raise ValueError("it has no place")
        return self


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_defaults_file_overrides_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, "balance:\n  cap: 30\n  threads: 9\nrate: 5e-4\n")
    config = load(Outer, path, ["balance.cap=40", "extra.cap=7"])
    assert (config.balance.cap, config.balance.threads, config.rate) == (40, 9, 5e-4)
    assert config.extra is not None and config.extra.cap == 7


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("balance:\n  capp: 3\n", [], "{path}:2: balance.capp: no such key; did you mean 'cap'?"),
        ("extra:\n  capp: 3\n", [], "{path}:2: extra.capp: no such key; did you mean 'cap'?"),
        (
            "named:\n  a:\n    capp: 3\n",
            [],
            "{path}:3: named.a.capp: no such key; did you mean 'cap'?",
        ),
        ("rate: fast\n", [], "{path}:1: rate: Input should be a valid number"),
        ("rate: .nan\n", [], "{path}:1: rate: Input should be a finite number"),
        ("\nbalance:\n  cap: 0\n", [], "{path}:3: balance.cap: Input should be greater than 0"),
        ("{}", ["balance.cpa=3"], "balance.cpa=3: balance.cpa: no such key; did you mean 'cap'?"),
        (
            "balance:\n  thraeds: 1",
            [],
            "{path}:2: balance.thraeds: no such key; did you mean 'threads'?",
        ),
        ("{}", ["cap=3"], "cap=3: cap: no such key; did you mean 'balance.cap' or 'extra.cap'?"),
        (
            "{}",
            ["balance.cap_size=3"],
            "balance.cap_size=3: balance.cap_size: no such key; did you mean 'cap'?",
        ),
        (
            "{}",
            ["balance.pairs_per_query=1"],
            "balance.pairs_per_query=1: balance.pairs_per_query: no such key; did you mean 'cap'?",
        ),
        (
            "{}",
            ["balance.zzz=3"],
            "balance.zzz=3: balance.zzz: no such key; the keys here are cap, threads",
        ),
        (
            "{}",
            ["balance.cap=1", "balance.threads=99"],
            "balance.threads=99: balance.threads: too many for the cap",
        ),
        ("balance:\n  threads: 99\n", ["balance.cap=1"], "{path}:2: balance.threads: too many"),
        ("{}", ["named.wrogn.cap=3"], "named.wrogn.cap=3: named.wrogn: did you mean 'wrong'?"),
        ("named:\n  a: {}\n", ["named.wrogn.cap=3"], "named.wrogn.cap=3: named.wrogn: did you"),
        ("named:\n  wrogn: {}\n", [], "{path}:2: named.wrogn: did you mean 'wrong'?"),
        ("{}", ["name='?'"], "name='?': name: write it out"),
        ("named: {none: {}}", [], "{path}: it has no place"),
        ("{}", ["files=a.txt"], "files=a.txt: files: Input should be a list, as [a.txt]"),
        ("files: [a, 3]", [], "{path}:1: files.1: Input should be a valid string"),
        (
            "width: 0",
            [],
            "{path}:1: width: Input should be greater than 0, or 'auto', or a section, not a value;"
            " its keys are pixels",
        ),
        ("width:\n  pixel: 1", [], "{path}:2: width.pixel: no such key; did you mean 'pixels'?"),
        ("balance:\n  cap: 3\n", ["balance={cap: 0, threads: 1}"], "balance={{cap: 0,"),
        (
            "{}",
            ["extra.cap=-1", "balance.cap"],
            "balance.cap: an override has the form section.key=value",
        ),
        ("rate: 1\n", ["rate.x=3"], "rate.x=3: 'rate' is a value, not a section"),
        ("rate: 1\nrate: 2\n", [], "{path}:2: rate: already set in line 1"),
        ("rate: 1\nbalance: &a\n  cap: *a\n", [], "{path}:2: balance.cap: an alias of what it is"),
        ("files: &a [b, [*a]]\n", [], "{path}:1: files.1.0: an alias of what it is in"),
        ("{}", ["files=&a [*a]"], "files=&a [*a]:1: files.0: an alias of what it is in"),
        ("a: [\n", [], "{path}:2: not valid YAML"),
        ("a: 2026-13-45\n", [], "{path}: there is a date in it that is none: month must be"),
        ("{}", ["rate=2026-02-31"], "rate=2026-02-31: day is out of range for month"),
        ("{}", ["balance=x"], "balance=x: balance: a section, not a value; its keys are cap, thre"),
        ("- a\n", [], "{path}:1: expected `section:` headings, found list"),
        (
            "name: ${NOT_SET_ANYWHERE}\n",
            [],
            "{path}:1: name: the environment variable NOT_SET_ANYWHERE is not set",
        ),
    ],
)
def test_faults_name_line_and_cure(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(Outer, path, overrides)
    assert str(caught.value).startswith(message.format(path=path))


def test_where_no_key_is_near_all_can_be_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {f"setting_number_{chr(122 - i)}": (int, i) for i in range(20)}
    wide = create_model("Wide", __base__=Settings, **fields)
    with pytest.raises(ConfigError, match="no such key; `make config` explains") as caught:
        load(wide, write(tmp_path, "q: 1\n"))
    _, *lines = str(caught.value).splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 100 for line in lines)
    assert " ".join(lines).replace(",", "").split() == sorted(fields)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "rate: x\nbalance:\n  cap: -1\n  zzz: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(Outer, path)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["3", "4", "1"]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(ConfigError, match=r"cc\.yaml: cannot be read .*did you mean .*c\.yaml"):
        load(Outer, tmp_path / "cc.yaml")


def test_environment_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/there")
    assert load(Outer, write(tmp_path, "name: ${PLACE}/x\n")).name == "/there/x"


def test_what_the_environment_lacks_can_be_shown_as_it_is_written(tmp_path: Path) -> None:
    unset: list[str] = []
    path = write(tmp_path, "name: ${NOT_SET_ANYWHERE}/x\n")
    loaded = load(Outer, path, unset=unset)
    assert "name: ${NOT_SET_ANYWHERE}/x" in explain(loaded)
    (said,) = unset
    assert said.startswith(f"{path}:1: name: the environment variable NOT_SET_ANYWHERE is not set")


def test_dump_loads_back_equal(tmp_path: Path) -> None:
    config = load(Outer, write(tmp_path, "{}"), ["extra.cap=7", "rate=0.25"])
    assert load(Outer, write(tmp_path, dump(config))) == config


def test_explain_is_valid_yaml_with_every_key_documented(tmp_path: Path) -> None:
    config = load(Outer, write(tmp_path, "{}"), ["name=a b"])
    text = "\n".join(explain(config))
    assert "  # Pairs a query.\n  cap: 20" in text
    assert load(Outer, write(tmp_path, text)) == config


def test_identity_leaves_operational_fields_out() -> None:
    assert Inner(threads=1).identity() == Inner(threads=2).identity() == {"cap": 20}
    assert Outer(balance=Inner(threads=8)).identity() == Outer().identity()
    assert Outer(balance=Inner(cap=8)).identity() != Outer().identity()
