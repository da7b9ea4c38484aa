"""Lists of prompts to draw: a CSV file of the user's, a published one by name, or a small one of ours."""

import hashlib
import re
import urllib.request
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from esd_jax import prompt_files
from esd_jax.evaluation import tiers
from esd_jax.inputs import cache, expanded, finite
from esd_jax.results import replacing

OURS = Path(__file__).parent / "lists"
ESD = "https://raw.githubusercontent.com/rohitgandikota/erasing/25613d27892326e0c7770f7f3555bea4be150089/data/"
UCE = (
    "https://raw.githubusercontent.com/rohitgandikota/unified-concept-editing/"
    "28c81ed5a3e41277c1a0dc55f738e7ab188e9718/data/"
)
# Name -> where it is published, and the sha256 of the file there. The first four are those of the protocols.
PUBLISHED = {
    "i2p": (f"{ESD}unsafe-prompts4703.csv", "6c1821aeeb20beb276b4e20ce4c4b801f9106dc935bafc9f6fd5e12aa2651e6f"),
    "imagenette": (f"{UCE}imagenette.csv", "6f82b5a186f7c44e443052dac15bafe07b4d4e821e7435288642b5756d705b5c"),
    "coco-30k": (f"{ESD}coco_30k.csv", "42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383"),
    "niche-artists": (
        f"{ESD}short_niche_art_prompts.csv",
        "200e8c522d95ba8eac01dd43e589769aff0c0143beeb8925bb646a84641a7f26",
    ),
    "big-artists": (
        f"{ESD}big_artist_prompts.csv",
        "a17a182d939aadaa641aa3fd495fe325d845d9677f6d86b6cc0b08e6d6beab33",
    ),
    "van-gogh": (f"{ESD}vangogh_prompts.csv", "c299f14b2945ed88b88966cc3460a9d9aeb3b0dd51c585ed454c6d6601d24f87"),
    "small-imagenet": (
        f"{ESD}small_imagenet_prompts.csv",
        "4ab01d9e98b0a23082b9cdbf52815cc639201fe6ba33b6ed8bbab58984c9fb2d",
    ),
}
TIERED = "tiers:"  # before a concept
LONGEST_NUMBER = 200  # bytes of a case's number, which names its image's file
# What a row is counted under in a table: the first of these columns that the file has.
GROUPS = ("class", "label_str", "artist", "group", "categories")


class Case(NamedTuple):
    """One image to draw. case: its number or name in the file; group: what it is counted under, "" if nothing.

    guidance: the file's own guidance scale for it, if any.
    """

    case: str
    prompt: str
    seed: int
    group: str = ""
    guidance: float | None = None


@dataclass(frozen=True)
class PromptList:
    """A file of prompts. sha256: of the file, so that a report identifies it. tiered: the concept, of tiers."""

    name: str
    sha256: str
    cases: tuple[Case, ...]
    tiered: str = ""


def load(source: str | Path) -> PromptList:
    """Reads a list of prompts.

    Args:
      source: a CSV file, one of `PUBLISHED`, or one of ours ("everyday"; "tiers:CONCEPT", those of `tiers.of`, counted
        by tier). A published one is downloaded once, checked, and kept in the cache ($XDG_CACHE_HOME/esd_jax/prompts).

    A CSV has a column "prompt", and may have those that the ESD repository's have: "case_number" (by default the row's
    number), "evaluation_seed" (by default one that follows from the prompt), "evaluation_guidance", and "class",
    "label_str", "artist", "group" or "categories", under which its images are counted.

    Raises:
      FileNotFoundError, ValueError: no such file or name, a download that fails or differs, no prompts in it, ...
    """
    path = expanded(source)
    name = str(source)
    if name.startswith(TIERED):
        return _tiered(name)
    if path.is_file():
        name = path.name
    elif (ours := OURS / f"{name}.csv").is_file():
        path = ours
    elif name in PUBLISHED:
        path = _published(name)
    else:
        known = ", ".join([f"{TIERED}CONCEPT", *(p.stem for p in sorted(OURS.glob("*.csv"))), *PUBLISHED])
        raise FileNotFoundError(f"there is no file {name} of prompts; give a CSV, or one of {known}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    published = digest in (known for _, known in PUBLISHED.values())  # I2P's has a row without a prompt
    return PromptList(name, digest, tuple(read(path, empty=published)))


def _tiered(name: str) -> PromptList:
    """The tiers of the concept behind "tiers:"."""
    concept = name.removeprefix(TIERED)
    every = tiers.of(concept)
    asked = [(tiers.TIERS[tier], prompt) for tier, prompts in every.items() for prompt in prompts]
    cases = [Case(str(i), prompt, zlib.crc32(prompt.encode()), group) for i, (group, prompt) in enumerate(asked)]
    digest = hashlib.sha256("\n".join(prompt for _, prompt in asked).encode()).hexdigest()
    return PromptList(name, digest, tuple(cases), tiered=concept)


def read(path: Path, *, empty: bool = False) -> list[Case]:
    """The cases of a CSV file.

    Args:
      path: the file.
      empty: let rows without a prompt stand.

    Raises ValueError naming the row that is wrong.
    """
    columns = ("case_number", "evaluation_seed", "evaluation_guidance", *GROUPS)
    rows = prompt_files.read_csv(path, columns, empty)
    group = next((column for column in GROUPS if column in rows[0]), "")
    cases = []
    for i, row in enumerate(rows):
        where, prompt = f"{path}, row {i + 1}", row["prompt"]
        seed = _seed(row["evaluation_seed"], where) if row.get("evaluation_seed") else zlib.crc32(prompt.encode())
        guidance = row.get("evaluation_guidance")
        guidance = finite(guidance, f"{where}: evaluation_guidance") if guidance else None
        number = row.get("case_number") or str(i)  # the published list of COCO captions has none
        if not re.fullmatch(r"[\w-]+", number) or len(number.encode()) > LONGEST_NUMBER:
            raise ValueError(f"{where}: case_number {number!r} is to name a file: a few letters, digits, - and _")
        cases.append(Case(number, prompt, seed, row.get(group, ""), guidance))
    _check_numbers(cases, f"{path} has")
    return cases


def _seed(text: str, where: str) -> int:
    """A seed of 32 bits, which may be written as a float is. Raises ValueError, naming where it stands."""
    number = finite(text, f"{where}: evaluation_seed")
    if not (number.is_integer() and 0 <= number < 2**32):
        raise ValueError(f"{where}: evaluation_seed={text} must be a whole number in 0..{2**32 - 1}")
    return int(number)


def _check_numbers(cases: Sequence[Case], what: str) -> None:
    (number, count), *_ = Counter(case.case for case in cases).most_common(1)
    if count > 1:
        raise ValueError(f"{what} case_number {number} {count} times: a number is one image's name")


def repeated(cases: Sequence[Case], samples: int) -> list[Case]:
    """Each case several times, from noise of its own: "12", "12_1", "12_2", ...

    Raises ValueError for fewer samples than one, and for a list that has a case "12_1" beside "12".
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    repeats = [
        case if k == 0 else case._replace(case=f"{case.case}_{k}", seed=zlib.crc32(f"{case.seed} {k}".encode()))
        for case in cases
        for k in range(samples)
    ]
    _check_numbers(repeats, f"with samples={samples}, the list has")
    return repeats


def _published(name: str) -> Path:
    """The file of a published list, downloaded if need be."""
    url, sha256 = PUBLISHED[name]
    path = cache("prompts") / f"{name}.csv"
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise FileNotFoundError(
                f"cannot download the prompts {name!r} from {url} ({reason}): put the file at {path}, or give a CSV"
            ) from error
        with replacing(path) as partial:
            partial.write_bytes(content)
    if (actual := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {actual[:12]}..., but {name!r} is {sha256[:12]}...: remove the file")
    return path
