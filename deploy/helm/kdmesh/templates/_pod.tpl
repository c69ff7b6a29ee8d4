{{- /* The pod of a server. Takes a server and `part`: leader, which answers, or worker, which only computes. */ -}}

{{- define "kdmesh.pod" -}}
{{- $values := .values -}}
{{- $isLeader := eq .part "leader" -}}
metadata:
  labels:
    {{- include "kdmesh.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ ternary .name (printf "%s-worker" .name) $isLeader }}
    app.kubernetes.io/part-of: kdmesh
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "kdmesh.config" . | sha256sum }}
    {{- with $values.rdma.networks }}
    k8s.v1.cni.cncf.io/networks: {{ . | quote }}
    {{- end }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "kdmesh.serviceAccount" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .root.Values.images.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- include "kdmesh.podSecurity" .root | nindent 4 }}
  terminationGracePeriodSeconds: {{ include "kdmesh.graceSeconds" . }}
  {{- with include "kdmesh.placement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "kdmesh.initContainers" . | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "kdmesh.image" . }}
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      command: [kdmesh]
      args:
        {{- include "kdmesh.args" . | nindent 8 }}
      env:
        {{- include "kdmesh.env" . | nindent 8 }}
      {{- if $isLeader }}
      ports:
        - {name: grpc, containerPort: {{ int $values.config.server.port }}, protocol: TCP}
        - {name: rest, containerPort: {{ int $values.config.server.rest_port }}, protocol: TCP}
      {{- include "kdmesh.probes" . | nindent 6 }}
      {{- with include "kdmesh.preStop" . }}
      lifecycle:
        preStop:
          {{- . | nindent 10 }}
      {{- end }}
      {{- end }}
      resources:
        {{- include "kdmesh.resources" . | nindent 8 }}
      securityContext:
        {{- include "kdmesh.containerSecurity" . | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        {{- include "kdmesh.volumeMounts" . | nindent 8 }}
    {{- with $values.containers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "kdmesh.volumes" . | nindent 4 }}
{{- end }}

{{- define "kdmesh.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.podSecurity.runAsUser }}
runAsGroup: {{ int .Values.podSecurity.runAsGroup }}
fsGroup: {{ int .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kdmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "kdmesh.graceSeconds" -}}
{{- add (int .values.preStopSeconds) (ceil .values.config.server.drain_s | int) (int .values.graceMarginSeconds) -}}
{{- end }}

{{- define "kdmesh.placement" -}}
{{- $keys := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" "schedulerName" -}}
{{- range $key := $keys }}
{{- with index $.values $key }}
{{ $key }}:{{ if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kdmesh.args" -}}
- {{ .name }}
- /etc/kdmesh/config/{{ .name }}.yaml
{{- if eq .name "teacher" }}
- --set
- server.runtime_dir=/run/kdmesh/{{ .root.Release.Namespace }}.$(POD_NAME)
{{- if gt (int .values.nodes) 1 }}
- --set
- engine.num_nodes=$(LWS_GROUP_SIZE)
- --set
- engine.node_rank=$(LWS_WORKER_INDEX)
- --set
- engine.dist_init_address=$(LWS_LEADER_ADDRESS):{{ int .values.leaderWorkerSet.port }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kdmesh.env" -}}
- {name: HOME, value: /home/kdmesh}
- {name: USER, value: kdmesh} # torch asks, and the number of the user has no name in the image
- {name: HF_HUB_OFFLINE, value: "1"}
{{- if eq .name "teacher" }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}
{{- if and (dig "rdma" false .values.config.server) (not (hasKey .values.env "UCX_TLS")) }}
- {name: UCX_TLS, value: "rc,self"}
{{- end }}
{{- include "kdmesh.givenEnv" . }}
{{- end }}

{{- /* What the values say: also of what fetches a model, which may need a proxy, or an authority of its own. */ -}}
{{- define "kdmesh.givenEnv" -}}
{{- range $key, $value := .values.env }}
- name: {{ $key }}
  value: {{ $value | quote }}
{{- end }}
{{- range $key, $from := .values.secretEnv }}
- name: {{ $key }}
  valueFrom: {secretKeyRef: {name: {{ $from.name }}, key: {{ $from.key }}}}
{{- end }}
{{- end }}

{{- /* Of those that answer; what only computes is never ready, and ends with its group. */ -}}
{{- define "kdmesh.probes" -}}
{{- $scheme := ternary "HTTPS" "HTTP" (not (not (include "kdmesh.tlsSecret" .))) -}}
{{- $period := 10 -}}
startupProbe:
  httpGet: {path: /reachz, port: rest, scheme: {{ $scheme }}}
  periodSeconds: {{ $period }}
  timeoutSeconds: 5
  failureThreshold: {{ div (mul (int .values.startupMinutes) 60) $period }}
readinessProbe:
  httpGet: {path: /reachz, port: rest, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /healthz, port: rest, scheme: {{ $scheme }}}
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 8
{{- end }}

{{- /* Kubernetes itself waits from 1.30 on; before, the image must have `sleep`. */ -}}
{{- define "kdmesh.preStop" -}}
{{- $seconds := int .values.preStopSeconds -}}
{{- if $seconds -}}
{{- if semverCompare ">=1.30.0-0" .root.Capabilities.KubeVersion.Version -}}
sleep: {seconds: {{ $seconds }}}
{{- else -}}
exec: {command: [sleep, {{ $seconds | quote }}]}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.resources" -}}
{{- $devices := dict -}}
{{- if gt (int .values.gpus.perNode) 0 -}}
{{- $_ := set $devices .values.gpus.resource (int .values.gpus.perNode) -}}
{{- end -}}
{{- with .values.rdma.resource -}}
{{- $_ := set $devices . (int $.values.rdma.count) -}}
{{- end -}}
requests:
  {{- merge (deepCopy $devices) .values.resources.requests | toYaml | nindent 2 }}
limits:
  {{- merge (deepCopy $devices) .values.resources.limits | toYaml | nindent 2 }}
{{- end }}

{{- /* What a small container needs that is there beside the server, or before it. */ -}}
{{- define "kdmesh.smallResources" -}}
requests: {cpu: 100m, memory: {{ . }}}
limits: {memory: {{ . }}}
{{- end }}
