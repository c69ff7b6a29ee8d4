{{- /* Names and labels. `server` in every file is a dict of root, name (teacher or rollout) and values. */ -}}

{{- define "kdmesh.fullname" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "kdmesh.name" -}}
{{ include "kdmesh.fullname" .root }}-{{ .name }}
{{- end }}

{{- define "kdmesh.selector" -}}
app.kubernetes.io/name: kdmesh
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kdmesh.labels" -}}
{{ include "kdmesh.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kdmesh
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* All pods of a server, those that only compute included. */ -}}
{{- define "kdmesh.podSelector" -}}
matchLabels:
  {{- include "kdmesh.selector" .root | nindent 2 }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [{{ .name }}, {{ .name }}-worker]
{{- end }}

{{- define "kdmesh.serviceAccount" -}}
{{- $account := .Values.serviceAccount -}}
{{- $account.name | default (ternary (include "kdmesh.fullname" .) "default" $account.create) -}}
{{- end }}

{{- define "kdmesh.image" -}}
{{- $images := .root.Values.images -}}
{{- $image := index $images .name -}}
{{- $path := printf "%s/%s" (trimSuffix "/" $images.registry) $image.repository | trimPrefix "/" -}}
{{ $path }}:{{ $images.tag | default .root.Chart.AppVersion }}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end }}

{{- /* Name that clients look up, without the port. */ -}}
{{- define "kdmesh.host" -}}
{{ include "kdmesh.name" . }}.{{ .root.Release.Namespace }}.svc.{{ .root.Values.clusterDomain }}
{{- end }}

{{- /* Kind of the object that has the replicas. */ -}}
{{- define "kdmesh.kind" -}}
{{- if eq .name "rollout" }}Deployment{{ else if gt (int .values.nodes) 1 }}LeaderWorkerSet{{ else }}StatefulSet{{ end -}}
{{- end }}

{{- define "kdmesh.apiVersion" -}}
{{- ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq (include "kdmesh.kind" .) "LeaderWorkerSet") -}}
{{- end }}

{{- /* Secret with the certificate of a server; empty without TLS. */ -}}
{{- define "kdmesh.tlsSecret" -}}
{{- $tls := .root.Values.tls -}}
{{- if $tls.existingSecret -}}
{{ $tls.existingSecret }}
{{- else if $tls.certManager.issuerRef.name -}}
{{ include "kdmesh.name" . }}-tls
{{- end -}}
{{- end }}

{{- define "kdmesh.modelClaim" -}}
{{- .Values.modelCache.existingClaim | default (printf "%s-models" (include "kdmesh.fullname" .)) -}}
{{- end }}

{{- define "kdmesh.sharingClaim" -}}
{{- .root.Values.teacher.sharing.existingClaim | default (printf "%s-sharing" (include "kdmesh.name" .)) -}}
{{- end }}
