"""python -m attune.crdgen [--check]: writes, or compares, everything that is generated from the models."""

import argparse
import sys
from pathlib import Path

import yaml

from attune.api import KINDS
from attune.api.meta import GROUP
from attune.crdgen.definition import build_definition
from attune.crdgen.reference import build_reference

_HEADER = "# Generated from operator/attune/api by `python -m attune.crdgen`; do not edit.\n"
# Helm keeps the definitions when the release is deleted: without them every Dataset, model and rollout would go too.
_CHART_ANNOTATIONS = """\
  annotations:
    helm.sh/resource-policy: keep
    {{- with .Values.crds.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
"""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that some reader of YAML takes for a number: 1e-3 is a string to PyYAML, and a float to Go."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        try:
            float(text)
        except ValueError:
            return self.represent_str(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _Dumper.represent_text)


def build_files() -> dict[str, str]:
    """Builds every generated file: path relative to the repository's root -> content."""
    files = {}
    for kind in KINDS:
        text = yaml.dump(build_definition(kind), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
        name = f"{GROUP}_{kind.PLURAL}.yaml"
        files[f"crds/{name}"] = _HEADER + text
        files[f"helm/attune/templates/crds/{name}"] = build_template(text)
    files["docs/reference/api.md"] = build_reference(KINDS)
    return files


def build_template(definition: str) -> str:
    """Makes a chart template of a definition.

    Raises:
        ValueError: where the text holds what Helm would take for an expression.
    """
    if "{{" in definition:
        raise ValueError("a description holds {{, which Helm would evaluate")
    head, mark, tail = definition.partition("  labels:\n")
    if not mark:
        raise ValueError("the definition has no labels before which annotations can go")
    return f"{{{{- if .Values.crds.install }}}}\n{_HEADER}{head}{_CHART_ANNOTATIONS}{mark}{tail}{{{{- end }}}}\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the files, or with --check tells which differ; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attune.crdgen", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a file is not up to date")
    parser.add_argument("--root", type=Path, default=Path(), help="root of the repository (default: here)")
    options = parser.parse_args(arguments)
    if not (options.root / "pyproject.toml").is_file():
        parser.error(f"{options.root.resolve()} is not the root of the repository: give --root")
    stale = []
    for name, content in build_files().items():
        path = options.root / name
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"{'out of date' if options.check else 'wrote'}: {name}\n")
    if options.check and stale:
        sys.stdout.write("run: python -m attune.crdgen\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
