{{- /* What a pod mounts, and what must be done to it before the server starts. */ -}}

{{- define "kdmesh.initContainers" -}}
{{- if and (eq .name "teacher") .values.sharing.prepare }}
- name: prepare-sharing
  image: {{ include "kdmesh.image" . }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [chown, "{{ int .root.Values.podSecurity.runAsUser }}:{{ int .root.Values.podSecurity.fsGroup }}", /run/kdmesh]
  resources:
    {{- include "kdmesh.smallResources" "64Mi" | nindent 4 }}
  securityContext:
    runAsNonRoot: false
    runAsUser: 0
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [CHOWN]}
  volumeMounts:
    - {name: sharing, mountPath: /run/kdmesh}
{{- end }}
{{- if hasPrefix "hf://" .values.model.uri }}
{{- $parts := splitn "@" 2 (trimPrefix "hf://" .values.model.uri) }}
- name: fetch-model
  image: {{ include "kdmesh.image" . }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [python, -c]
  args:
    - |
      {{- .root.Files.Get "files/fetch_model.py" | trim | nindent 6 }}
  env:
    - {name: HOME, value: /home/kdmesh}
    - {name: MODEL, value: {{ $parts._0 | quote }}}
    - {name: REVISION, value: {{ $parts._1 | default "main" | quote }}}
    - {name: TARGET, value: {{ include "kdmesh.modelPath" . | quote }}}
    {{- with .values.model.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- with .values.model.tokenSecret }}
    {{- if .name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
    {{- end }}
    {{- end }}
    {{- with include "kdmesh.givenEnv" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  resources:
    {{- include "kdmesh.smallResources" "4Gi" | nindent 4 }}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: home, mountPath: /home/kdmesh}
    - {name: tmp, mountPath: /tmp}
    {{- with .values.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- with .values.initContainers }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kdmesh.volumeMounts" -}}
- {name: config, mountPath: /etc/kdmesh/config, readOnly: true}
- {name: jobs, mountPath: /etc/kdmesh/jobs, readOnly: true}
- {name: home, mountPath: /home/kdmesh}
- {name: tmp, mountPath: /tmp}
{{- if .values.shmSize }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if regexMatch "^(hf|pvc)://" .values.model.uri }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if eq .name "teacher" }}
- {name: sharing, mountPath: /run/kdmesh}
{{- if .values.rowCache.enabled }}
- {name: rows, mountPath: /var/lib/kdmesh/rows}
{{- end }}
{{- end }}
{{- if .root.Values.auth.tokensSecret.name }}
- {name: tokens, mountPath: /etc/kdmesh/tokens, readOnly: true}
{{- end }}
{{- if include "kdmesh.tlsSecret" . }}
- {name: tls, mountPath: /etc/kdmesh/tls, readOnly: true}
{{- end }}
{{- if .root.Values.tls.clientCaSecret.name }}
- {name: client-ca, mountPath: /etc/kdmesh/client-ca, readOnly: true}
{{- end }}
{{- with .values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kdmesh.volumes" -}}
- name: config
  configMap: {name: {{ include "kdmesh.name" . }}}
- name: jobs
  configMap: {name: {{ .values.jobs.existingConfigMap | default (printf "%s-jobs" (include "kdmesh.name" .)) }}}
- name: home
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- with .values.shmSize }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- if hasPrefix "hf://" .values.model.uri }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "kdmesh.modelClaim" .root }}}
{{- else if hasPrefix "pvc://" .values.model.uri }}
- name: models
  persistentVolumeClaim: {claimName: {{ (splitn "/" 2 (trimPrefix "pvc://" .values.model.uri))._0 }}, readOnly: true}
{{- end }}
{{- if eq .name "teacher" }}
- name: sharing
  {{- if ne .part "leader" }}
  emptyDir: {} # nobody asks this pod for rows
  {{- else if eq .values.sharing.mode "claim" }}
  persistentVolumeClaim: {claimName: {{ include "kdmesh.sharingClaim" . }}}
  {{- else if eq .values.sharing.mode "hostPath" }}
  hostPath: {path: {{ .values.sharing.path }}, type: DirectoryOrCreate}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- with .root.Values.auth.tokensSecret }}
{{- if .name }}
- name: tokens
  secret: {secretName: {{ .name }}, defaultMode: 0440, items: [{key: {{ .key }}, path: tokens.yaml}]}
{{- end }}
{{- end }}
{{- with include "kdmesh.tlsSecret" . }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .root.Values.tls.clientCaSecret }}
{{- if .name }}
- name: client-ca
  secret: {secretName: {{ .name }}, defaultMode: 0440, items: [{key: {{ .key }}, path: ca.crt}]}
{{- end }}
{{- end }}
{{- with .values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
