"""The JSON Schema of a deployment file, derived from the classes that read it.

Rules between fields (``min_copies`` is at most ``actors``, model ids differ) are not in it;
``expertmesh check`` knows them all.
"""

from __future__ import annotations

from typing import Any

from router.config import IMPORT_PATH, AppConfig

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def args_schema() -> dict[str, Any]:
    """Return the schema of what stands under an application's ``args:``."""
    return {"$schema": _DIALECT, **AppConfig.model_json_schema()}


def file_schema() -> dict[str, Any]:
    """Return the schema of a whole file: Ray Serve's own, with ours at ``args:``."""
    from ray.serve.schema import ServeDeploySchema

    schema: dict[str, Any] = {"$schema": _DIALECT, **ServeDeploySchema.model_json_schema()}
    schema["title"] = "ExpertMesh deployment file"
    definitions = schema["$defs"]
    args = AppConfig.model_json_schema()
    ours = {**args.pop("$defs"), "AppConfig": args}
    assert not ours.keys() & definitions.keys(), "Serve has classes of the same names"
    definitions.update(ours)
    application = definitions["ServeApplicationSchema"]
    application["properties"]["args"] = {"$ref": "#/$defs/AppConfig"}
    application["properties"]["import_path"] = {"const": IMPORT_PATH}
    application["required"] = sorted({*application.get("required", []), "args", "import_path"})
    schema["properties"]["applications"]["minItems"] = 1
    return schema
