"""The fields of KubeRay's RayCluster and RayJob that our files use, as a strict JSON schema: a typo is no field.

Not KubeRay's own definition, which is a megabyte: only what cluster/ needs, with the values that make sense there.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
YES_OR_NO: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^\d+(m|Mi|Gi)?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: str = "", /, **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object", "properties": known, "required": required.split(), "additionalProperties": False
    }  # fmt: skip


def listed(one: Schema, at_least: int = 1) -> Schema:
    return {"type": "array", "items": one, "minItems": at_least}


AMOUNTS: Schema = {
    "type": "object",
    "properties": {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY},
    "required": ["cpu", "memory"],
    "additionalProperties": False,
}
CONTAINER = fields(
    "name image resources",
    name=TEXT,
    image=TEXT,
    env=listed(fields("name value", name=TEXT, value={"type": "string"})),
    ports=listed(fields("name containerPort", name=TEXT, containerPort={**COUNT, "maximum": 65535})),
    resources=fields("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=listed(fields("name mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/"})),
)
POD = fields(
    "spec",
    spec=fields(
        "containers restartPolicy",
        containers=listed(CONTAINER),
        restartPolicy={"const": "Never"},  # autoscaler v2 wants it
        securityContext=fields("", runAsNonRoot={"const": True}, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=COUNT,
        tolerations=listed(
            fields(
                "key operator effect",
                key=TEXT,
                operator={"enum": ["Exists", "Equal"]},
                value={"type": "string"},
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        volumes=listed(fields("name", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT))),
    ),
)
CLUSTER = fields(
    "rayVersion enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    enableInTreeAutoscaling=YES_OR_NO,
    autoscalerOptions=fields(
        "version idleTimeoutSeconds",
        version={"const": "v2"},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    authOptions=fields("mode", mode={"enum": ["token", "disabled"]}),
    headGroupSpec=fields("rayStartParams template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=listed(
        fields(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
JOB = fields(
    "entrypoint rayClusterSpec backoffLimit shutdownAfterJobFinishes",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=YES_OR_NO,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
)
METADATA = fields("", name=TEXT, generateName=TEXT)


def document(kind: str, spec: Schema) -> Schema:
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata=METADATA, spec=spec,
    )  # fmt: skip


SCHEMAS = {"RayCluster": document("RayCluster", CLUSTER), "RayJob": document("RayJob", JOB)}
