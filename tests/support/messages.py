"""What an error message must be: one line that names the thing and the mend."""

import re


def one_line(*words: object) -> str:
    """A pattern for `pytest.raises(match=...)`: a single line that holds every one of `words`."""
    return r"\A" + "".join(f"(?=[^\n]*{re.escape(str(word))})" for word in words) + r"[^\n]+\Z"
