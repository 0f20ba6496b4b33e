{{/*
What the schema cannot say because it takes arithmetic or a look into the run's file. All of it at once, each sentence
with its cure, before anything is sent to a cluster.
*/}}
{{- define "qlora.refuse" -}}
{{- $wrong := list -}}
{{- $wrong = concat $wrong (include "qlora.refuseNames" . | fromJsonArray) -}}
{{- $wrong = concat $wrong (include "qlora.refuseRun" . | fromJsonArray) -}}
{{- $wrong = concat $wrong (include "qlora.refuseEnv" . | fromJsonArray) -}}
{{- $wrong = concat $wrong (include "qlora.refuseShape" . | fromJsonArray) -}}
{{- $wrong = concat $wrong (include "qlora.refuseDeletion" . | fromJsonArray) -}}
{{- if $wrong -}}
{{- $problems := ternary "problem" "problems" (eq (len $wrong) 1) -}}
{{- fail (printf "\n%d %s in the values of this chart\n  %s\n" (len $wrong) $problems (join "\n  " $wrong)) -}}
{{- end -}}
{{- end -}}

{{- define "qlora.refuseNames" -}}
{{- $wrong := list -}}
{{- if not (regexMatch "^[a-z][-a-z0-9]*$" .Release.Name) -}}
{{- $wrong = append $wrong (printf
  "release name %q: KubeRay takes names of a-z, 0-9 and -, a letter first. Try %q"
  .Release.Name (printf "run-%s" .Release.Name | replace "." "-")) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{- define "qlora.refuseRun" -}}
{{- $wrong := list -}}
{{- $read := .Values.config | default "{}" | fromYaml -}}
{{- $readable := not (hasKey $read "Error") -}}
{{- if not $readable -}}
{{- $wrong = append $wrong
  "config: is no YAML of sections and keys. Hand over the file itself: --set-file config=run.yaml" -}}
{{- end -}}
{{- range .Values.settings -}}
{{- if or (contains "$(" .) (contains "$$" .) (contains "\n" .) -}}
{{- $wrong = append $wrong (printf
  "settings: %q: Kubernetes would change $( and $$ on the way, and a word is one line. Say it in the run's file"
  .) -}}
{{- end -}}
{{- end -}}
{{- $text := join "\n" (prepend .Values.settings .Values.config) -}}
{{- if regexMatch (include "qlora.secrets" .) $text -}}
{{- $wrong = append $wrong
  "config or settings: holds a password, a key or a signed address, which everybody who may read the namespace would see. Put it into a secret and name that in existingSecrets" -}}
{{- end -}}
{{- if and .Values.config $readable -}}
{{- $url := include "qlora.outputUrl" . -}}
{{- $kept := list -}}
{{- range .Values.volumes -}}
{{- $claimed := or .source.persistentVolumeClaim .source.csi -}}
{{- if and $claimed (not .readOnly) }}{{ $kept = append $kept .mountPath }}{{ end -}}
{{- end -}}
{{- $safe := contains "://" $url -}}
{{- range $kept -}}{{- if hasPrefix (printf "%s/" .) (printf "%s/" $url) }}{{ $safe = true }}{{ end -}}{{- end -}}
{{- if not $url -}}
{{- $wrong = append $wrong "config: output.url is missing. Name a bucket's folder, as s3://bucket/runs/first" -}}
{{- else if not $safe -}}
{{- $wrong = append $wrong (printf
  "config: output.url is %s, which ends with its pod. Name a bucket, or a folder of a claim that can be written (values: volumes)"
  $url) -}}
{{- end -}}
{{- $grace := include "qlora.setting" (dict "root" . "section" "train" "key" "stop_grace_s" "default" 120) | int -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (add $grace 30) -}}
{{- $wrong = append $wrong (printf
  "terminationGracePeriodSeconds: %d s do not hold train.stop_grace_s (%d) and 30 s around it. Set it to %d or more"
  (int .Values.terminationGracePeriodSeconds) $grace (add $grace 30)) -}}
{{- end -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{/* What a password in an address, a signed address and well-known keys look like. */}}
{{- define "qlora.secrets" -}}
{{- $password := "://[^\\s/?#@:]+:[^\\s/@]*@" -}}
{{- $signature := "[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=" -}}
{{- $key := "\\b(AKIA|ASIA)[0-9A-Z]{16}\\b|\\bhf_[A-Za-z0-9]{30,}" -}}
{{- join "|" (list $password $signature $key) -}}
{{- end -}}

{{- define "qlora.refuseEnv" -}}
{{- $wrong := list -}}
{{- $ours := list "HOME" "XDG_CACHE_HOME" "HF_HOME" "TRITON_CACHE_DIR" "TORCHINDUCTOR_CACHE_DIR" "TORCH_EXTENSIONS_DIR"
  "QLORA_WARNING_FILE" "RAY_USAGE_STATS_ENABLED" -}}
{{- $kuberays := list "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_AUTH_TOKEN_PATH" "RAY_ADDRESS" "RAY_REDIS_ADDRESS"
  "REDIS_USERNAME" "REDIS_PASSWORD" "RAY_enable_autoscaler_v2" "RAY_TMPDIR" -}}
{{- range $name, $value := .Values.env -}}
{{- if has $name $ours -}}
{{- $wrong = append $wrong (printf
  "env: %s is set by the chart, to a folder that can be written. Leave it out"
  $name) -}}
{{- else if has $name $kuberays -}}
{{- $wrong = append $wrong (printf "env: %s belongs to KubeRay. Leave it out" $name) -}}
{{- else if regexMatch "(?i)^(https?|no)_proxy$" $name -}}
{{- $wrong = append $wrong (printf "env: %s belongs to proxy (http, https, direct). Set it there" $name) -}}
{{- else if or (regexMatch (include "qlora.secrets" $) (toString $value)) (and $value (regexMatch "(?i)(^|_)(secret|token|password|passwd|credentials?|key|api_?key)(_id)?$" $name)) -}}
{{- $wrong = append $wrong (printf
  "env: %s looks like a secret, and values are kept in the release. Put it into a secret and name that in existingSecrets"
  $name) -}}
{{- end -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{- define "qlora.refuseShape" -}}
{{- $wrong := list -}}
{{- if and (empty .Values.config) (or (gt (int .Values.nodes) 1) .Values.gpusPerNode) -}}
{{- $wrong = append $wrong (printf
  "%d x %d GPUs: without config it is the smoke, one rank on a CPU. Add --set-file config=run.yaml, or leave nodes and gpusPerNode out"
  (int .Values.nodes) (int .Values.gpusPerNode)) -}}
{{- end -}}
{{- $memory := include "qlora.mebibytes" .Values.worker.memory | int64 -}}
{{- $shm := include "qlora.mebibytes" .Values.shm.size | int64 -}}
{{- if and $memory (ge $shm $memory) -}}
{{- $wrong = append $wrong (printf
  "shm.size: %s in memory leaves nothing of worker.memory, %s. Raise the memory or lower shm.size"
  .Values.shm.size .Values.worker.memory) -}}
{{- end -}}
{{- $cpu := .Values.worker.cpu | toString -}}
{{- $cpus := ternary (divf (trimSuffix "m" $cpu | float64) 1000.0) (float64 $cpu) (hasSuffix "m" $cpu) -}}
{{- if lt $cpus (float64 .Values.gpusPerNode) -}}
{{- $wrong = append $wrong (printf
  "worker.cpu: %s for %d GPUs, and each rank takes a CPU. Set %d or more"
  $cpu (int .Values.gpusPerNode) (int .Values.gpusPerNode)) -}}
{{- end -}}
{{- if and .Values.worker.sameTopology .Values.worker.affinity.podAffinity -}}
{{- $wrong = append $wrong "worker.sameTopology and worker.affinity.podAffinity say the same thing. Keep one" -}}
{{- end -}}
{{- $taken := list "/scratch" "/tmp" "/dev/shm" "/cache" "/nvme" "/etc/qlora" "/etc/qlora-ca" -}}
{{- range .Values.volumes -}}
{{- if ne (len .source) 1 -}}
{{- $wrong = append $wrong (printf
  "volumes: %s has %d sources. Name one"
  .name (len .source)) -}}
{{- end -}}
{{- if has .name $taken }}{{ $wrong = append $wrong (printf "volumes: two are named %s" .name) }}{{ end -}}
{{- if has (trimSuffix "/" .mountPath) $taken -}}
{{- $wrong = append $wrong (printf
  "volumes: %s is mounted at %s, where something is already. Choose another folder"
  .name .mountPath) -}}
{{- end -}}
{{- $taken = concat $taken (list .name (trimSuffix "/" .mountPath)) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{/* KubeRay wants each kind once for a state, and workers to go before their cluster, the cluster before the RayJob. */}}
{{- define "qlora.refuseDeletion" -}}
{{- $wrong := list -}}
{{- $seconds := dict -}}
{{- range .Values.deletionRules -}}
{{- $state := .condition.jobStatus | default .condition.jobDeploymentStatus -}}
{{- $key := printf "%s %s" $state .policy -}}
{{- if hasKey $seconds $key -}}
{{- $wrong = append $wrong (printf
  "deletionRules: %s for %s stands there twice"
  .policy $state) -}}
{{- end -}}
{{- $_ := set $seconds $key (int .condition.ttlSeconds) -}}
{{- end -}}
{{- range $state := list "SUCCEEDED" "FAILED" "Failed" -}}
{{- range list (list "DeleteWorkers" "DeleteCluster") (list "DeleteCluster" "DeleteSelf") (list "DeleteWorkers" "DeleteSelf") -}}
{{- $first := printf "%s %s" $state (index . 0) -}}
{{- $then := printf "%s %s" $state (index . 1) -}}
{{- if and (hasKey $seconds $first) (hasKey $seconds $then) -}}
{{- if lt (int (get $seconds $then)) (int (get $seconds $first)) -}}
{{- $wrong = append $wrong (printf
  "deletionRules: for %s, %s comes after %d s and %s after %d s. Turn them round"
  $state (index . 1) (int (get $seconds $then)) (index . 0) (int (get $seconds $first))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}
