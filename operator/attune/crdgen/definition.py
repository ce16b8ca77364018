"""From a kind to its CustomResourceDefinition."""

import inspect
from typing import Any

from attune.api.meta import CATEGORY, CEL, GROUP, VERSION, Resource
from attune.crdgen.structural import Schema, build_structural_schema


def build_definition(kind: type[Resource]) -> dict[str, Any]:
    """Builds the CustomResourceDefinition of a kind, as it is sent to the API server."""
    singular = kind.KIND.lower()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.PLURAL}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "attune"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.KIND,
                "listKind": f"{kind.KIND}List",
                "plural": kind.PLURAL,
                "singular": singular,
                "shortNames": [kind.SHORT_NAME],
                "categories": [CATEGORY],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {
                            "name": name,
                            "type": column_type,
                            "jsonPath": path,
                            **({"priority": priority} if priority else {}),
                        }
                        for name, column_type, path, priority in kind.COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": build_root_schema(kind)},
                }
            ],
        },
    }


def build_root_schema(kind: type[Resource]) -> Schema:
    """Builds the schema of a whole object: apiVersion, kind, metadata, spec and status."""
    spec = build_structural_schema(_part(kind, "spec"), defaults=True)
    status = build_structural_schema(_part(kind, "status"), defaults=False)
    schema: Schema = {
        "type": "object",
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "required": ["spec"],
        "properties": {
            # The API server sets the bounds of these itself; a schema that states others is refused or of no effect.
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{kind.KIND}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    if kind.RULES:
        schema[CEL] = [{"rule": rule, "message": message} for rule, message in kind.RULES]
    return schema


def _part(kind: type[Resource], name: str) -> Any:
    return kind.model_fields[name].annotation
