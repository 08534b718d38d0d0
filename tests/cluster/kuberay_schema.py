"""The part of the official schemas that the files in cluster/ use, written from KubeRay's `ray.io/v1` types and the
Kubernetes API, and made strict: an unknown field is an error here, where a Kubernetes server would drop it."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}


def record(*required: str, **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def table(values: Schema) -> Schema:
    """An object with any names."""
    return {"type": "object", "additionalProperties": values}


def many(items: Schema) -> Schema:
    """A list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXTS = table(STRING)
METADATA = record(name=STRING, namespace=STRING, labels=TEXTS, annotations=TEXTS)
SECRET_KEY = record("secretKeyRef", secretKeyRef=record("name", "key", name=STRING, key=STRING, optional=FLAG))
ENVIRONMENT = many(record("name", name=STRING, value=STRING, valueFrom=SECRET_KEY))
SECURITY = record(
    allowPrivilegeEscalation=FLAG,
    capabilities=record(drop=many(STRING), add=many(STRING)),
    readOnlyRootFilesystem=FLAG,
    runAsNonRoot=FLAG,
    runAsUser=NUMBER,
)
SECCOMP = record("type", type=one_of("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=STRING)
POD_SECURITY = record(runAsNonRoot=FLAG, runAsUser=NUMBER, runAsGroup=NUMBER, fsGroup=NUMBER, seccompProfile=SECCOMP)
RESOURCES = record(requests=table(QUANTITY), limits=table(QUANTITY))
CONTAINER = record(
    "name",
    "image",
    name=STRING,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(STRING),
    args=many(STRING),
    env=ENVIRONMENT,
    envFrom=many(record(secretRef=record("name", name=STRING, optional=FLAG))),
    ports=many(record("containerPort", name=STRING, containerPort=NUMBER, protocol=one_of("TCP", "UDP"))),
    resources=RESOURCES,
    securityContext=SECURITY,
    volumeMounts=many(record("name", "mountPath", name=STRING, mountPath=STRING, readOnly=FLAG)),
)
TOLERATION = record(
    key=STRING,
    operator=one_of("Exists", "Equal"),
    value=STRING,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD = record(
    "containers",
    containers=many(CONTAINER),
    volumes=many(record("name", name=STRING, emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY))),
    securityContext=POD_SECURITY,
    serviceAccountName=STRING,
    automountServiceAccountToken=FLAG,
    terminationGracePeriodSeconds=NUMBER,
    tolerations=many(TOLERATION),
    nodeSelector=TEXTS,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
)
TEMPLATE = record("spec", metadata=METADATA, spec=POD)

AUTOSCALER = record(
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=NUMBER,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    resources=RESOURCES,
    image=STRING,
    imagePullPolicy=STRING,
    env=ENVIRONMENT,
    securityContext=SECURITY,
)
HEAD_STATE = record(
    backend=one_of("redis", "rocksdb"),
    redisAddress=STRING,
    redisUsername=record(value=STRING, valueFrom=SECRET_KEY),
    redisPassword=record(value=STRING, valueFrom=SECRET_KEY),
    externalStorageNamespace=STRING,
)
HEAD_GROUP = record(
    "template",
    template=TEMPLATE,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
)
WORKER_GROUP = record(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
    groupName=STRING,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    priority=NUMBER,
    suspend=FLAG,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=TEMPLATE,
)
CLUSTER_SPEC = record(
    "headGroupSpec",
    rayVersion=STRING,
    suspend=FLAG,
    managedBy=STRING,
    authOptions=record(mode=one_of("token", "disabled"), secretName=STRING),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=HEAD_STATE,
    headServiceAnnotations=TEXTS,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=many(WORKER_GROUP),
)
JOB_SPEC = record(
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=TEXTS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=record(backoffLimit=NUMBER),
    submitterPodTemplate=TEMPLATE,
    clusterSelector=TEXTS,
    managedBy=STRING,
    backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=NUMBER,
    suspend=FLAG,
    rayClusterSpec=CLUSTER_SPEC,
)
SELECTOR = record(matchLabels=TEXTS)
POLICY_SPEC = record(
    "podSelector",
    podSelector=SELECTOR,
    policyTypes=many(one_of("Ingress", "Egress")),
    ingress=many(
        {
            **record(
                "from",
                ports=many(record(protocol=STRING, port=NUMBER)),
                **{"from": many(record(podSelector=SELECTOR, namespaceSelector=SELECTOR))},
            )
        }
    ),
)
DEPLOYMENT_SPEC = record(
    "selector",
    "template",
    replicas=NUMBER,
    strategy=record("type", type=one_of("Recreate", "RollingUpdate")),
    selector=SELECTOR,
    template=TEMPLATE,
)
SERVICE_SPEC = record(
    type=one_of("ClusterIP"),
    selector=TEXTS,
    ports=many(record("port", name=STRING, port=NUMBER, targetPort=NUMBER, protocol=STRING)),
)
SPECS = {
    ("ray.io/v1", "RayCluster"): CLUSTER_SPEC,
    ("ray.io/v1", "RayJob"): JOB_SPEC,
    ("networking.k8s.io/v1", "NetworkPolicy"): POLICY_SPEC,
    ("apps/v1", "Deployment"): DEPLOYMENT_SPEC,
    ("v1", "Service"): SERVICE_SPEC,
}


def schema_of(document: dict[str, Any]) -> Schema:
    """The schema of a Kubernetes object."""
    spec = SPECS[document["apiVersion"], document["kind"]]
    return record("metadata", "spec", apiVersion=STRING, kind=STRING, metadata=METADATA, spec=spec)
