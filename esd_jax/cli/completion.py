"""`esd-jax completion`: what a shell needs to complete verbs, flags and the names of configs."""

from absl import flags

from esd_jax.cli.common import Verb

USAGE = """\
  esd-jax completion bash|zsh|fish                   a script with which your shell completes words"""
BASH = """\
_esd_jax() {
  local line=${COMP_LINE:0:COMP_POINT}
  local word=${line##* } last=${COMP_WORDS[COMP_CWORD]}
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "VERBS" -- "$word")); return; fi
  case "${COMP_WORDS[1]}" in
CASES
  esac
  # Bash parts words at "=", and replaces what follows it alone.
  case "$word" in *=*) COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}") ;; esac
  [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "${last#=}"))
}
complete -o filenames -o nospace -F _esd_jax esd-jax
"""
CASE = '    NAME) COMPREPLY=($(compgen -W "WORDS" -- "$word")) ;;'
# A function of its own: zsh does not read the one for bash. It works sourced, and as a file _esd-jax in $fpath.
ZSH = """\
#compdef esd-jax
_esd_jax() {
  local -a offered
  if (( CURRENT == 2 )); then compadd -- VERBS; return; fi
  case $words[2] in
CASES
  esac
  local missing=1
  compadd -S '' -- ${(M)offered:#*=} && missing=0
  compadd -- ${offered:#*=} && missing=0
  (( missing )) || return 0
  compset -P '*='
  _files
}
if [[ $funcstack[1] == _esd-jax ]]; then
  _esd_jax "$@"
else
  (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
  compdef _esd_jax esd-jax
fi
"""
ZSH_CASE = "    NAME) offered=(WORDS) ;;"
SHELLS = ("bash", "zsh", "fish")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("shell", [], f"{', '.join(SHELLS)}; also without --shell=.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    if len(values.shell) != 1 or values.shell[0] not in SHELLS:
        raise ValueError(f"name one shell: {', '.join(SHELLS)}")
    print(script(values.shell[0]), end="")


def script(shell: str) -> str:
    """The completion script of a shell."""
    from esd_jax.cli import VERBS

    offered = {name: words(name) for name in VERBS}
    if shell == "fish":
        lines = ["complete -c esd-jax -n __fish_use_subcommand -f -a '{}'".format(" ".join(VERBS))]
        for verb, flags_of in offered.items():
            wanted = f"__fish_seen_subcommand_from {verb}"
            lines.append(f"complete -c esd-jax -n '{wanted}' -a '{' '.join(flags_of)}'")
        return "\n".join(lines) + "\n"
    text, case = (BASH, CASE) if shell == "bash" else (ZSH, ZSH_CASE)
    cases = "\n".join(case.replace("NAME", verb).replace("WORDS", " ".join(w)) for verb, w in offered.items())
    return text.replace("VERBS", " ".join(VERBS)).replace("CASES", cases)


def words(verb: str) -> list[str]:
    """What may follow a verb: its flags, a value's ending in "="; of erase, the fields, configs and kinds, too."""
    from esd_jax.cli import VERBS

    values = VERBS[verb].defined()
    candidates = [f"--{name}" + ("" if values[name].boolean else "=") for name in values]
    if verb == "erase":
        from esd_jax import config_files, kinds, recipe

        fields = recipe.field_types()
        candidates += [f"--{name}" + ("" if kind is bool else "=") for name, kind in fields.items()]
        candidates += [f"--config={name}" for name in config_files.config_names()]
        candidates += [f"--kind={kind}" for kind in kinds.KINDS]
    return sorted(set(candidates))


VERB = Verb(
    USAGE, define, run, positional="shell", computes=False,
    examples=(
        "esd-jax completion bash > ~/.local/share/bash-completion/completions/esd-jax",
        "esd-jax completion zsh > ~/.zfunc/_esd-jax",
        "esd-jax completion fish > ~/.config/fish/completions/esd-jax.fish",
    ),
)  # fmt: skip
