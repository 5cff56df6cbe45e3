"""What the published schemas of JobSet and of SkyPilot's tasks say of the fields that the files of launch/ use, as JSON Schema.

An object has the fields that are used and no others, so that a misspelt one is an error, as it is for kubectl and for sky. A field that is
new in launch/ is looked up and added here. Sources:

JobSet    the openAPIV3Schema of v1alpha2, kubernetes-sigs/jobset at 0107852, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml;
          of metadata it says that it is an object, and Kubernetes' ObjectMeta says the rest
SkyPilot  get_task_schema, get_resources_schema and get_storage_schema, skypilot-org/skypilot at 00052df, sky/utils/schemas.py
"""

from __future__ import annotations

from typing import Any

TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def fields(known: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object of known fields."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def mapping(values: dict[str, Any]) -> dict[str, Any]:
    """An object whose keys are the user's."""
    return {"type": "object", "additionalProperties": values}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


QUANTITY = {
    "type": ["integer", "string"],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}
CONTAINER = {
    "name": TEXT, "image": TEXT, "command": array(TEXT), "resources": fields({"limits": mapping(QUANTITY)}),
    "volumeMounts": array(fields({"name": TEXT, "mountPath": TEXT}, "mountPath", "name")),
}  # fmt: skip
POD = {
    "restartPolicy": TEXT, "terminationGracePeriodSeconds": COUNT, "nodeSelector": mapping(TEXT),
    "containers": array(fields(CONTAINER, "name")),
    "volumes": array(fields({"name": TEXT, "persistentVolumeClaim": fields({"claimName": TEXT}, "claimName")}, "name")),
}  # fmt: skip
JOB = {
    "completionMode": TEXT, "completions": COUNT, "parallelism": COUNT, "backoffLimit": COUNT,
    "template": fields({"spec": fields(POD, "containers")}),
}  # fmt: skip
REPLICATED = {"name": TEXT, "replicas": COUNT, "template": fields({"spec": fields(JOB, "template")})}
JOBSET = fields(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": fields({"name": TEXT, "annotations": mapping(TEXT)}),
        "spec": fields({"failurePolicy": fields({"maxRestarts": COUNT}), "replicatedJobs": array(fields(REPLICATED, "name", "template"))}),
    },
    "apiVersion", "kind", "metadata", "spec",
)  # fmt: skip

STORAGE = {"source": TEXT, "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}}
RESOURCES = {"accelerators": TEXT, "use_spot": FLAG, "job_recovery": fields({"max_restarts_on_errors": {"type": "integer", "minimum": 0}})}
TASK = fields({
    "name": TEXT, "num_nodes": COUNT, "resources": fields(RESOURCES), "workdir": TEXT, "setup": TEXT, "run": TEXT, "volumes": mapping(TEXT),
    "file_mounts": mapping({"anyOf": [TEXT, fields(STORAGE)]}),
})  # fmt: skip
