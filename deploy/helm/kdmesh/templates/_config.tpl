{{- /* The server's own configuration: the values, and what the chart decides. */ -}}

{{- define "kdmesh.modelPath" -}}
{{- $uri := .values.model.uri -}}
{{- if hasPrefix "hf://" $uri -}}
{{- $parts := splitn "@" 2 (trimPrefix "hf://" $uri) -}}
/models/{{ $parts._0 }}/{{ $parts._1 | default "main" }}
{{- else if hasPrefix "pvc://" $uri -}}
{{- $parts := splitn "/" 2 (trimPrefix "pvc://" $uri) -}}
{{ printf "/models/%s" ($parts._1 | default "") | trimSuffix "/" }}
{{- else -}}
{{ $uri }}
{{- end -}}
{{- end }}

{{- define "kdmesh.config" -}}
{{- $config := deepCopy .values.config -}}
{{- $server := $config.server -}}
{{- if ne $config.engine.kind "fake" -}}
{{- $_ := set $config.engine "model" (include "kdmesh.modelPath" .) -}}
{{- end -}}
{{- $auth := .root.Values.auth -}}
{{- if $auth.tokensSecret.name -}}
{{- $_ := set $server "auth" (merge (dict "tokens" "/etc/kdmesh/tokens/tokens.yaml") ($server.auth | default dict)) -}}
{{- end -}}
{{- if $auth.allowAnonymous -}}
{{- $_ := set $server "allow_anonymous" true -}}
{{- end -}}
{{- if include "kdmesh.tlsSecret" . -}}
{{- $tls := dict "cert" "/etc/kdmesh/tls/tls.crt" "key" "/etc/kdmesh/tls/tls.key" -}}
{{- if .root.Values.tls.clientCaSecret.name -}}
{{- $_ := set $tls "client_ca" "/etc/kdmesh/client-ca/ca.crt" -}}
{{- end -}}
{{- $_ := set $server "tls" $tls -}}
{{- end -}}
{{- $_ := set $config "jobs" (merge (dict "file" "/etc/kdmesh/jobs/jobs.yaml") ($config.jobs | default dict)) -}}
{{- if dig "rowCache" "enabled" false .values -}}
{{- $_ := set $config "cache" (merge (dict "directory" "/var/lib/kdmesh/rows") ($config.cache | default dict)) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}
