{{- /* What no schema can say: a sentence for every combination that cannot work. */ -}}

{{- define "kdmesh.check" -}}
{{- $values := .Values -}}
{{- $first := include "kdmesh.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $first) -}}
{{- fail (printf "all names begin with %s, and that of a Service holds only lower-case letters, digits and dashes, of which a letter is first: choose another release name, or set nameOverride" $first) -}}
{{- end -}}
{{- if not (or $values.teacher.enabled $values.rollout.enabled) -}}
{{- fail "neither teacher.enabled nor rollout.enabled: there is nothing to install" -}}
{{- end -}}
{{- if and $values.tls.existingSecret $values.tls.certManager.issuerRef.name -}}
{{- fail "tls.existingSecret and tls.certManager.issuerRef.name are both set: the certificate can come from one of them" -}}
{{- end -}}
{{- with $values.tls.certManager -}}
{{- $signed := toDate "2006" "2000" -}}
{{- if le ($signed | mustDateModify .duration).Unix ($signed | mustDateModify .renewBefore).Unix -}}
{{- fail (printf "tls.certManager.duration is %s, and renewBefore %s: a certificate must be good for longer than it is renewed before its end" .duration .renewBefore) -}}
{{- end -}}
{{- end -}}
{{- if and $values.auth.tokensSecret.name $values.auth.allowAnonymous -}}
{{- fail "auth.tokensSecret.name and auth.allowAnonymous contradict each other" -}}
{{- end -}}
{{- range $name := list "teacher" "rollout" -}}
{{- $server := dict "root" $ "name" $name "values" (index $values $name) -}}
{{- if $server.values.enabled -}}
{{- include "kdmesh.checkAccess" $server -}}
{{- include "kdmesh.checkModel" $server -}}
{{- include "kdmesh.checkGpus" $server -}}
{{- include "kdmesh.checkReplicas" $server -}}
{{- include "kdmesh.checkEnvironment" $server -}}
{{- include "kdmesh.checkLabels" $server -}}
{{- if and $server.values.jobs.overrides $server.values.jobs.existingConfigMap -}}
{{- fail (printf "%s.jobs.overrides and existingConfigMap are both set: what jobs may take can stand in one of them" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $values.teacher.enabled -}}
{{- include "kdmesh.checkTeacher" (dict "root" . "name" "teacher" "values" $values.teacher) -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkAccess" -}}
{{- $server := .values.config.server -}}
{{- $auth := .root.Values.auth -}}
{{- $hasTls := include "kdmesh.tlsSecret" . -}}
{{- $identities := $server.auth | default dict -}}
{{- if not (or $auth.tokensSecret.name $auth.allowAnonymous (dig "jwt" "" $identities) (dig "certificates" "" $identities)) -}}
{{- fail "nothing says who may use the servers: name a Secret of tokens in auth.tokensSecret.name (docs/kubernetes.md makes one), or set auth.allowAnonymous=true on a network of trusted users" -}}
{{- end -}}
{{- if and $auth.allowAnonymous $server.auth -}}
{{- fail (printf "auth.allowAnonymous and %s.config.server.auth contradict each other" .name) -}}
{{- end -}}
{{- if and .root.Values.tls.clientCaSecret.name (not $hasTls) -}}
{{- fail "tls.clientCaSecret.name needs a certificate of the server: set tls.existingSecret or tls.certManager.issuerRef.name" -}}
{{- end -}}
{{- if and (dig "certificates" "" $identities) (not .root.Values.tls.clientCaSecret.name) -}}
{{- fail (printf "%s.config.server.auth.certificates needs tls.clientCaSecret.name, which vouches for them" .name) -}}
{{- end -}}
{{- if and (dig "rdma" false $server) (not (and $hasTls (not $auth.allowAnonymous))) -}}
{{- fail (printf "%s.config.server.rdma needs TLS and identities: what it tells a client is the right to read its memory; set tls and auth.tokensSecret.name" .name) -}}
{{- end -}}
{{- if or (eq (int $server.port) 0) (eq (int $server.rest_port) 0) (eq (int $server.port) (int $server.rest_port)) -}}
{{- fail (printf "%s.config.server.port is %v and rest_port %v: they must be fixed and two" .name $server.port $server.rest_port) -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkModel" -}}
{{- $kind := .values.config.engine.kind -}}
{{- if and (ne $kind "fake") (not .values.model.uri) -}}
{{- fail (printf "%s.model.uri is empty: give hf://ORG/NAME, pvc://CLAIM/PATH, or a path in the image or in %s.volumes" .name .name) -}}
{{- end -}}
{{- if and (eq $kind "fake") .values.model.uri -}}
{{- fail (printf "%s.model.uri is %s, but an engine of kind fake has no model" .name .values.model.uri) -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkGpus" -}}
{{- $engine := .values.config.engine -}}
{{- $gpus := int .values.gpus.perNode -}}
{{- $nodes := int (.values.nodes | default 1) -}}
{{- if eq $engine.kind "sglang" -}}
{{- $copies := ternary 1 (int ($engine.data_parallel | default 1)) (dig "arguments" "enable_dp_attention" false $engine) -}}
{{- $tensor := int ($engine.tensor_parallel | default 1) -}}
{{- $pipeline := int ($engine.pipeline_parallel | default 1) -}}
{{- if mod $tensor $nodes -}}
{{- fail (printf "%s.nodes is %d and engine.tensor_parallel %d: it must be a multiple, every node has an equal part" .name $nodes $tensor) -}}
{{- end -}}
{{- if and (gt $nodes 1) (or (gt $pipeline 1) (gt $copies 1)) -}}
{{- fail (printf "%s.nodes is %d, so engine.pipeline_parallel and data_parallel must be 1" .name $nodes) -}}
{{- end -}}
{{- $needed := div (mul $tensor $pipeline $copies) $nodes -}}
{{- if and (ne ($engine.device | default "cuda") "cpu") (ne (int $needed) $gpus) -}}
{{- fail (printf "%s: tensor_parallel %d x pipeline_parallel %d x data_parallel %d over %d node(s) needs %d GPUs in each pod, and gpus.perNode is %d" .name $tensor $pipeline $copies $nodes $needed $gpus) -}}
{{- end -}}
{{- else if gt $gpus 1 -}}
{{- fail (printf "%s.gpus.perNode is %d, but an engine of kind %s takes at most one; kind sglang takes more" .name $gpus $engine.kind) -}}
{{- end -}}
{{- if and (eq ($engine.device | default "") "cpu") (gt $gpus 0) -}}
{{- fail (printf "%s.gpus.perNode is %d, but engine.device is cpu" .name $gpus) -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkReplicas" -}}
{{- $scaling := .values.autoscaling -}}
{{- if $scaling.enabled -}}
{{- if not (kindIs "invalid" .values.replicas) -}}
{{- fail (printf "%s.replicas is %v, but %s.autoscaling.enabled decides how many there are; leave one of them out" .name .values.replicas .name) -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling.minReplicas %v is more than maxReplicas %v" .name $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- $token := $scaling.prometheusTokenSecret.name -}}
{{- $ca := $scaling.prometheusCaSecret.name -}}
{{- if and (or $token $ca) (not (and $scaling.enabled (eq $scaling.kind "keda"))) -}}
{{- fail (printf "%s.autoscaling.prometheusTokenSecret and prometheusCaSecret are for keda, which autoscaling.enabled and kind switch on" .name) -}}
{{- end -}}
{{- if and $ca (not $token) -}}
{{- fail (printf "%s.autoscaling.prometheusCaSecret.name needs prometheusTokenSecret.name: keda reads it only with a token" .name) -}}
{{- end -}}
{{- if and $token (hasPrefix "http://" $scaling.prometheus) -}}
{{- fail (printf "%s.autoscaling.prometheus is %s: a token in prometheusTokenSecret goes to an https:// address only" .name $scaling.prometheus) -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkLabels" -}}
{{- range $key, $_ := .values.podLabels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $key) (eq $key "helm.sh/chart") -}}
{{- fail (printf "%s.podLabels.%s is a label of the chart's own, by which its pods are found" $.name $key) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkEnvironment" -}}
{{- range $key, $_ := .values.secretEnv -}}
{{- if hasKey $.values.env $key -}}
{{- fail (printf "%s.env.%s and secretEnv.%s are both set: a variable has one value" $.name $key $key) -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := .values.env -}}
{{- if regexMatch "(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$" $key -}}
{{- fail (printf "%s.env.%s looks like a secret, which Helm would keep in the release: put it in a Secret and name that in %s.secretEnv" $.name $key $.name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kdmesh.checkTeacher" -}}
{{- $config := .values.config -}}
{{- $isGroup := gt (int .values.nodes) 1 -}}
{{- if and $isGroup (ne $config.engine.kind "sglang") -}}
{{- fail (printf "teacher.nodes is %v, but an engine of kind %s works on one" .values.nodes $config.engine.kind) -}}
{{- end -}}
{{- if and $isGroup .values.rowCache.enabled -}}
{{- fail "teacher.rowCache.enabled needs teacher.nodes 1" -}}
{{- end -}}
{{- $cache := $config.cache | default dict -}}
{{- if ne (not .values.rowCache.enabled) (not (dig "directory_mib" false $cache)) -}}
{{- fail "teacher.rowCache.enabled and teacher.config.cache.directory_mib go together: a volume for rows, and how much of it they take" -}}
{{- end -}}
{{- $rows := include "kdmesh.mebibytes" .values.rowCache.size -}}
{{- if and .values.rowCache.enabled $rows (le (float64 $rows) (float64 $cache.directory_mib)) -}}
{{- fail (printf "teacher.config.cache.directory_mib is %v, which is all of teacher.rowCache.size (%s) or more" $cache.directory_mib .values.rowCache.size) -}}
{{- end -}}
{{- $slab := mulf (float64 $config.slab.slots) (float64 $config.slab.slot_mib) -}}
{{- $memory := include "kdmesh.mebibytes" (.values.resources.limits.memory | default "") -}}
{{- if and $memory (ge $slab (float64 $memory)) -}}
{{- fail (printf "teacher.config.slab takes %v x %v MiB, which is all of resources.limits.memory (%v) or more: the slab is charged to it, beside the model" $config.slab.slots $config.slab.slot_mib .values.resources.limits.memory) -}}
{{- end -}}
{{- $sharing := .values.sharing -}}
{{- if and (eq $sharing.mode "claim") (not (or $sharing.existingClaim $sharing.node)) -}}
{{- fail "teacher.sharing.mode is claim: name a claim on a local volume in existingClaim, or the node to make one on in node" -}}
{{- end -}}
{{- if and $sharing.prepare (ne $sharing.mode "hostPath") -}}
{{- fail (printf "teacher.sharing.prepare is for mode hostPath, not %s" $sharing.mode) -}}
{{- end -}}
{{- end }}

{{- /* A quantity of memory in MiB; empty when it is not written with one of the usual suffixes. */ -}}
{{- define "kdmesh.mebibytes" -}}
{{- $factors := dict "Ki" 0.0009765625 "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0 "M" 0.95367 "G" 953.67 "T" 953674.3 -}}
{{- $text := toString . -}}
{{- range $suffix, $factor := $factors -}}
{{- if regexMatch (printf "^[0-9.]+%s$" $suffix) $text -}}
{{- mulf (float64 (trimSuffix $suffix $text)) $factor -}}
{{- end -}}
{{- end -}}
{{- end }}
