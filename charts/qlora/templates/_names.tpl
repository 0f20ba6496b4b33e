{{/* What things are called, and what the run's own file says about itself. */}}

{{/* The run's settings as written: the file of --set-file config=..., {} without. */}}
{{- define "qlora.config" -}}
{{- $read := .Values.config | default "{}" | fromYaml -}}
{{- toYaml $read -}}
{{- end -}}

{{/*
One setting of the run, for what placement has to know of it: the last section.key=value wins, then the file,
then the default. Takes (dict "root" $ "section" .. "key" .. "default" ..).
*/}}
{{- define "qlora.setting" -}}
{{- $section := get (include "qlora.config" .root | fromYaml) .section | default dict -}}
{{- $found := .default -}}
{{- if and (kindIs "map" $section) (hasKey $section .key) -}}
{{- if not (kindIs "invalid" (get $section .key)) }}{{ $found = get $section .key }}{{ end -}}
{{- end -}}
{{- $prefix := printf "%s.%s=" .section .key -}}
{{- range .root.Values.settings -}}
{{- if hasPrefix $prefix . -}}{{- $found = trimPrefix $prefix . -}}{{- end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Where the run leaves its adapter, as `qlora status` writes it: no file:// before a path, no slash at the end. */}}
{{- define "qlora.outputUrl" -}}
{{- $smoke := ternary "" "/scratch/smoke" (not (empty .Values.config)) -}}
{{- $url := include "qlora.setting" (dict "root" . "section" "output" "key" "url" "default" $smoke) -}}
{{- regexReplaceAll "/+$" (trimPrefix "file://" $url) "" -}}
{{- end -}}

{{/* A digest says exactly which image it is, and wins over the tag. */}}
{{- define "qlora.image" -}}
{{- with .Values.image -}}
{{- $repository := .repository | default "qlora-job" -}}
{{- $tag := .tag | default $.Chart.AppVersion -}}
{{- if .digest -}}{{ $repository }}@{{ .digest }}{{- else -}}{{ $repository }}:{{ $tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Short, because KubeRay lets a RayJob's name have 47 characters and puts more behind it. */}}
{{- define "qlora.release" -}}
{{- .Release.Name | trunc 38 | trimSuffix "-" -}}
{{- end -}}

{{/*
The RayJob's name ends in a hash of all that its clusters are made of: settings, image, shape. KubeRay never reruns a
RayJob that finished and passes no change on to its cluster, so what changes has to be a new one. The run's name and
folder are in its settings, so the new one goes on where the old one was.
*/}}
{{- define "qlora.jobName" -}}
{{- $made := list (include "qlora.rayClusterSpec" .) (include "qlora.submitter" .) (include "qlora.entrypoint" .) -}}
{{- printf "%s-%s" (include "qlora.release" .) (join "\n" $made | sha256sum | trunc 8) -}}
{{- end -}}

{{/* A name per content, so that a running job's file never changes under it. */}}
{{- define "qlora.configName" -}}
{{- printf "%s-%s" (include "qlora.release" .) (.Values.config | sha256sum | trunc 8) -}}
{{- end -}}

{{- define "qlora.cacheClaim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" .Release.Name) -}}
{{- end -}}

{{- define "qlora.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary .Release.Name "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/*
What all pods of the release are found by. Not app.kubernetes.io/name: KubeRay's own services select by it.
*/}}
{{- define "qlora.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: qlora
{{- end -}}

{{- define "qlora.labels" -}}
{{ include "qlora.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* One word of a shell's command line, whatever is in it. */}}
{{- define "qlora.quote" -}}
{{- if regexMatch "^[A-Za-z0-9_@%+=:,./-]+$" . -}}{{- . -}}
{{- else -}}'{{ . | replace "'" "'\"'\"'" }}'{{- end -}}
{{- end -}}

{{/*
What runs on the head. KubeRay's submitter reads this string with bash, Ray quotes the words anew and a shell of the
head reads them again, so one round of quotes is right.
*/}}
{{- define "qlora.entrypoint" -}}
{{- $words := list "qlora" "train" "--on" "ray" "--nodes" (.Values.nodes | int | toString) -}}
{{- $words = concat $words (list "--gpus-per-node" (.Values.gpusPerNode | int | toString)) -}}
{{- $words = concat $words (list "--wait-minutes" (.Values.waitMinutes | int | toString)) -}}
{{- $words = append $words (ternary "/etc/qlora/run.yaml" "/opt/qlora/smoke/run.yaml" (not (empty .Values.config))) -}}
{{- $quoted := list -}}
{{- range concat $words .Values.settings -}}{{- $quoted = append $quoted (include "qlora.quote" .) -}}{{- end -}}
{{- join " " $quoted -}}
{{- end -}}

{{/* Mebibytes of a quantity such as 16Gi; 0 for one written in another way, which is then not compared. */}}
{{- define "qlora.mebibytes" -}}
{{- $unit := regexFind "[A-Za-z]*$" . -}}
{{- $number := trimSuffix $unit . | float64 -}}
{{- $factor := get (dict "Ki" 0.0009765625 "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0) $unit | default 0.0 -}}
{{- mulf $number $factor | int64 -}}
{{- end -}}
