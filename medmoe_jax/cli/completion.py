"""Print what completes commands, options and names in a shell.

  source <(medmoe completion bash)                    in ~/.bashrc
  source <(medmoe completion zsh)                     in ~/.zshrc, after compinit
  medmoe completion fish | source                     in ~/.config/fish/config.fish

Completes commands, their options, what an option may be, the recipes after --config= and the tasks
after --tasks=.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from medmoe_jax.api.configs import recipes
from medmoe_jax.cli.session import no_rest
from medmoe_jax.evaluation.tasks import SUITE, list_tasks, suites
from medmoe_jax.training.terminal import say


class Option(NamedTuple):
    """An option of a command.

    Attributes:
      name: `--workdir`.
      takes: whether a value follows it.
      values: those that it may have, if they can be listed.
    """

    name: str
    takes: bool
    values: tuple[str, ...]

    @property
    def word(self) -> str:
        """How it is written before its value."""
        return f"{self.name}=" if self.takes else self.name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("shell", choices=list(SHELLS), help="whose completion")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    say(SHELLS[arguments.shell](arguments.top))


def _commands(top: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parser of every command."""
    (sub,) = (one for one in top._actions if isinstance(one, argparse._SubParsersAction))
    return sub.choices


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What a command takes, and what the commands within it take."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _options(parser: argparse.ArgumentParser) -> list[Option]:
    """The options of a command; `--config` is of all."""
    named = [SUITE + name for name in suites()]
    listed = {"tasks": (*(task.name for task in list_tasks()), *named)}
    found = {"--config": Option("--config", True, tuple(recipes()))}
    for action in _actions(parser):
        values = tuple(map(str, action.choices or listed.get(action.dest, ())))
        for name in action.option_strings:
            if name.startswith("--"):
                found[name] = Option(name, action.nargs != 0, values)
    return list(found.values())


def _before(top: argparse.ArgumentParser) -> list[Option]:
    """The options that stand before a command."""
    names = [(name, action) for action in top._actions for name in action.option_strings]
    return [Option(name, one.nargs != 0, ()) for name, one in names if name.startswith("--")]


def _own(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand after a command without being an option."""
    places = [action for action in parser._actions if not action.option_strings]
    return [str(word) for action in places for word in action.choices or ()]


# The word in the making is looked for as a whole (compgen of zsh does not look). Bash completes
# what stands behind its last `=` or `:`, zsh all of it: what the shell has already is cut.
_BASH = """_medmoe() {{
  local line=${{COMP_LINE:0:$COMP_POINT}} part=${{COMP_WORDS[COMP_CWORD]}}
  local command= words= word one i
  word=${{line##*[[:space:]]}}
  [[ $part == [=:] ]] && part=
  for ((i = 1; i < COMP_CWORD; i++)); do
    one=${{COMP_WORDS[i]}}
    [[ $one == [a-z]* && ${{COMP_WORDS[i - 1]}} != [=:] ]] && {{ command=$one; break; }}
  done
  case $command in
{cases}
  esac
  case "$command $word" in
{values}
  esac
  COMPREPLY=()
  while IFS= read -r one; do
    [[ -n $one && $one == "$word"* ]] && COMPREPLY+=("${{one#"${{word%"$part"}}"}}")
  done < <(compgen -W "$words" -- "$word")
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[@]}} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -o default -F _medmoe medmoe"""


def _bash(top: argparse.ArgumentParser) -> str:
    commands = _commands(top)
    first = [*commands, *(option.word for option in _before(top))]
    cases = [f'    "") words="{" ".join(first)}" ;;']
    values = []
    for name, parser in commands.items():
        own, options = _own(parser), [option.word for option in _options(parser)]
        cases.append(f'    {name}) words="{" ".join(own + options)}" ;;')
        for option in _options(parser):
            if option.values:
                told = " ".join(option.word + value for value in option.values)
                values.append(f'    "{name} {option.word}"*) words="{told}" ;;')
    return _BASH.format(cases="\n".join(cases), values="\n".join(values))


def _zsh(top: argparse.ArgumentParser) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(top)}"


def _fish(top: argparse.ArgumentParser) -> str:
    lines = []
    for name, parser in _commands(top).items():
        about = (parser.description or "").splitlines()[0]
        lines.append(f"complete -c medmoe -n __fish_use_subcommand -fa {name} -d {_quoted(about)}")
        begin = f"complete -c medmoe -n {_quoted(f'__fish_seen_subcommand_from {name}')}"
        if own := _own(parser):
            lines.append(f"{begin} -fa {_quoted(' '.join(own))}")
        for option in _options(parser):
            lines.append(f"{begin} -l {option.name[2:]}{_fish_values(option)}")
    return "\n".join(lines)


def _fish_values(option: Option) -> str:
    if option.values:
        return f" -xa {_quoted(' '.join(option.values))}"
    return " -r" if option.takes else ""


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# By shell: what makes the script, of the parser of all commands.
SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
