{{/* What submitter, head, workers and the test's pod share. */}}

{{- define "qlora.podLabels" -}}
{{ include "qlora.selector" . }}
{{- $more := merge dict .Values.podLabels }}
{{- if eq .Values.gang.scheduler "kai" }}
{{- $_ := set $more "kai.scheduler/queue" .Values.gang.queue }}
{{- end }}
{{- with $more }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* As Pod Security "restricted" asks. The token of the service account stays outside: nothing here uses it. */}}
{{- define "qlora.podBasics" -}}
serviceAccountName: {{ include "qlora.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
restartPolicy: Never
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.user.uid | int }}
  runAsGroup: {{ .Values.user.gid | int }}
  fsGroup: {{ .Values.user.gid | int }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- if eq .Values.gang.scheduler "kai" }}
schedulerName: kai-scheduler
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "ipcLock" bool). */}}
{{- define "qlora.containerBasics" -}}
image: {{ include "qlora.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  runAsNonRoot: true
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  seccompProfile: {type: RuntimeDefault}
  capabilities:
    drop: [ALL]
    {{- if .ipcLock }}
    add: [IPC_LOCK]
    {{- end }}
{{- end -}}

{{/* Requests are the limits, so that a pod is not evicted for what it was promised. Takes cpu, memory and more. */}}
{{- define "qlora.resources" -}}
{{- $all := merge (dict "cpu" (toString .cpu) "memory" .memory) (.more | default dict) -}}
limits: {{ toJson $all }}
requests: {{ toJson $all }}
{{- end -}}

{{/* The root is read-only: whatever is written has one of these places. */}}
{{- define "qlora.home" -}}
- {name: HOME, value: /scratch}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end -}}

{{- define "qlora.places" -}}
{{ include "qlora.home" . }}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: TRITON_CACHE_DIR, value: /scratch/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /scratch/inductor}
- {name: TORCH_EXTENSIONS_DIR, value: /scratch/torch_extensions}
{{- end -}}

{{/* KubeRay sets it, too; said here, an operator that knows no tokens starts no cluster that is open to all. */}}
{{- define "qlora.rayToken" -}}
- {name: RAY_AUTH_MODE, value: token}
{{- end -}}

{{/* Of the places, then what the site adds: proxy, certificates, its own. */}}
{{- define "qlora.env" -}}
env:
  {{- include "qlora.places" . | nindent 2 }}
  {{- include "qlora.rayToken" . | nindent 2 }}
  # the ranks look for this file, which preStop makes: then they save and end
  - {name: QLORA_WARNING_FILE, value: /scratch/notice}
  {{- with .Values.caBundle.configMap }}
  {{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "CURL_CA_BUNDLE" "AWS_CA_BUNDLE" }}
  - {name: {{ . }}, value: /etc/qlora-ca/ca.crt}
  {{- end }}
  {{- end }}
  {{- with .Values.proxy }}
  {{- /* Ray's own traffic must not take a proxy, not even one that a secret names */}}
  {{- $direct := prepend .direct "localhost,127.0.0.1,.svc,.cluster.local" | join "," }}
  {{- range $name, $value := dict "HTTP_PROXY" .http "HTTPS_PROXY" .https "NO_PROXY" $direct }}
  {{- if $value }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  - {name: {{ lower $name }}, value: {{ $value | quote }}}
  {{- end }}
  {{- end }}
  {{- end }}
  {{- range $name, $value := .Values.env }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- if or .Values.existingSecrets .Values.existingConfigMaps }}
envFrom:
  {{- range .Values.existingConfigMaps }}
  - configMapRef: {name: {{ . | quote }}}
  {{- end }}
  {{- range .Values.existingSecrets }}
  - secretRef: {name: {{ . | quote }}}
  {{- end }}
{{- end }}
{{- end -}}

{{/* An empty folder of a pod, or a volume made for it where a class of the node's own disks is named. */}}
{{- define "qlora.scratch" -}}
{{- if .storageClassName -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ .storageClassName | quote }}
      resources: {requests: {storage: {{ .size | quote }}}}
{{- else -}}
emptyDir: {sizeLimit: {{ .size | quote }}}
{{- end -}}
{{- end -}}

{{- define "qlora.cached" -}}
{{- or .Values.cache.create (not (empty .Values.cache.existingClaim)) -}}
{{- end -}}

{{/* What every pod has. */}}
{{- define "qlora.commonMounts" -}}
- {name: scratch, mountPath: /scratch}
- {name: tmp, mountPath: /tmp}
{{- if .Values.config }}
- {name: config, mountPath: /etc/qlora, readOnly: true}
{{- end }}
{{- end -}}

{{- define "qlora.commonVolumes" -}}
- name: scratch
  {{- include "qlora.scratch" .Values.scratch | nindent 2 }}
# Ray's session, sockets and logs
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmp.size | quote }}}
{{- if .Values.config }}
- name: config
  configMap: {name: {{ include "qlora.configName" . }}}
{{- end }}
{{- end -}}

{{/* What head and workers have beyond it. */}}
{{- define "qlora.runMounts" -}}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /cache}
{{- if .Values.caBundle.configMap }}
- {name: ca, mountPath: /etc/qlora-ca, readOnly: true}
{{- end }}
{{- range .Values.volumes }}
- {{ dict "name" (printf "own-%s" .name) "mountPath" .mountPath "readOnly" (.readOnly | default false) | toJson }}
{{- end }}
{{- end -}}

{{/* The claim is for workers only, so that one which a single node can mount serves a run of one node. */}}
{{- define "qlora.workerCache" -}}
{{- if eq (include "qlora.cached" .) "true" -}}
persistentVolumeClaim: {claimName: {{ include "qlora.cacheClaim" . | quote }}}
{{- else -}}
emptyDir: {sizeLimit: {{ .Values.cache.size | quote }}}
{{- end -}}
{{- end -}}

{{- define "qlora.runVolumes" -}}
# in memory, and counted against the memory of the container
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shm.size | quote }}}
{{- with .Values.caBundle }}
{{- if .configMap }}
- name: ca
  configMap: {name: {{ .configMap | quote }}, items: [{key: {{ .key | quote }}, path: ca.crt}]}
{{- end }}
{{- end }}
{{- range .Values.volumes }}
- {{ mergeOverwrite (dict "name" (printf "own-%s" .name)) .source | toJson }}
{{- end }}
{{- end -}}

{{/*
Before a pod is ended: ask the run to stop, then wait while it saves, so that no signal cuts it off. $1 is how its
processes here are known, $2 the seconds to wait at most, $3 the signal that they take as a question, none for ranks,
which look for the file. Waited for are the processes of the beginning, not ranks that are started anew meanwhile. The
brackets in $1 keep a pattern from finding itself; a process that ended but was not collected has an empty cmdline.
*/}}
{{- define "qlora.preStop" -}}
: >"$QLORA_WARNING_FILE"
for one in /proc/[0-9]*; do
  tr '\0' ' ' <"$one/cmdline" | grep -q -e "$1" && run="$run $one"
done 2>/dev/null
for one in $run; do
  [ -z "$3" ] || kill -s "$3" "${one#/proc/}"
done
left=$2
for one in $run; do
  while [ "$left" -gt 0 ] && grep -q -s . "$one/cmdline"; do
    sleep 1
    left=$((left - 1))
  done
done
{{- end -}}

{{/*
Takes (dict "root" $ "waitsFor" pattern "signal" name or nothing). Kubernetes' clock starts with preStop: 15 s of it are
left to Ray.
*/}}
{{- define "qlora.lifecycle" -}}
preStop:
  exec:
    command:
      - sh
      - -c
      - |
        {{- include "qlora.preStop" .root | trim | nindent 8 }}
      - preStop
      - {{ .waitsFor | quote }}
      - {{ sub (int .root.Values.terminationGracePeriodSeconds) 15 | toString | quote }}
      - {{ .signal | default "" | quote }}
{{- end -}}
