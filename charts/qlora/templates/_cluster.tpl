{{/* The Ray cluster of a run, and the pod that hands the run to it. */}}

{{- define "qlora.rayClusterSpec" -}}
rayVersion: {{ .Values.rayVersion | quote }}
# KubeRay makes the secret with the token, or takes the named one, and hands it to all pods; it is in no manifest of ours
authOptions:
  mode: token
  {{- with .Values.rayToken.existingSecret }}
  secretName: {{ . | quote }}
  {{- end }}
headGroupSpec:
  # No CPU to give away: ranks land on workers only. The smoke's one rank lands here, for what it leaves is in a folder
  # of its pod, which what steers it has to see. Few objects go through Ray, so its store of them is small.
  rayStartParams:
    num-cpus: {{ ternary "0" "1" (not (empty .Values.config)) | quote }}
    num-gpus: "0"
    dashboard-host: 0.0.0.0
    object-store-memory: "268435456"
  template:
    {{- include "qlora.headPod" . | nindent 4 }}
{{- if .Values.config }}
workerGroupSpecs:
  - groupName: workers
    replicas: {{ .Values.nodes | int }}
    minReplicas: {{ .Values.nodes | int }}
    maxReplicas: {{ .Values.nodes | int }}
    rayStartParams: {num-gpus: {{ .Values.gpusPerNode | int | toString | quote }}, object-store-memory: "268435456"}
    template:
      {{- include "qlora.workerPod" . | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "qlora.headPod" -}}
metadata:
  labels:
    {{- include "qlora.podLabels" . | nindent 4 }}
  {{- with .Values.podAnnotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  {{- include "qlora.podBasics" . | nindent 2 }}
  {{- with include "qlora.where" (dict "of" .Values.head) | trim }}{{ nindent 2 . }}{{ end }}
  # as long as the workers: what steers the run is here, and they save while it is
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds | int }}
  containers:
    - name: ray-head
      {{- include "qlora.containerBasics" (dict "root" .) | nindent 6 }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
      {{- include "qlora.env" . | nindent 6 }}
      resources:
        {{- include "qlora.resources" (ternary .Values.head .Values.worker (not (empty .Values.config))) | nindent 8 }}
      # what steers the run; not the shell around it, which would just die of the signal
      lifecycle:
        {{- $steers := "^[^ ]*[p]ython[^ ]* .*qlora train --on ray" }}
        {{- include "qlora.lifecycle" (dict "root" . "waitsFor" $steers "signal" "TERM") | nindent 8 }}
      volumeMounts:
        {{- include "qlora.commonMounts" . | nindent 8 }}
        {{- include "qlora.runMounts" . | nindent 8 }}
  volumes:
    {{- include "qlora.commonVolumes" . | nindent 4 }}
    - name: cache
      emptyDir: {sizeLimit: {{ .Values.cache.size | quote }}}
    {{- include "qlora.runVolumes" . | nindent 4 }}
{{- end -}}

{{- define "qlora.workerPod" -}}
metadata:
  labels:
    {{- include "qlora.podLabels" . | nindent 4 }}
  {{- $annotations := merge dict .Values.podAnnotations }}
  {{- range $kind := list "required" "preferred" }}
  {{- with get $.Values.kueue (printf "%sTopology" $kind) }}
  {{- $_ := set $annotations (printf "kueue.x-k8s.io/podset-%s-topology" $kind) . }}
  {{- end }}
  {{- end }}
  {{- with $annotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  {{- include "qlora.podBasics" . | nindent 2 }}
  {{- $own := include "qlora.selector" . | fromYaml }}
  {{- with include "qlora.where" (dict "of" .Values.worker "workers" $own) | trim }}{{ nindent 2 . }}{{ end }}
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds | int }}
  containers:
    - name: ray-worker
      {{- include "qlora.containerBasics" (dict "root" . "ipcLock" .Values.rdma.ipcLock) | nindent 6 }}
      {{- include "qlora.env" . | nindent 6 }}
      {{- $more := merge dict .Values.rdma.resources }}
      {{- if .Values.gpusPerNode }}
      {{- $_ := set $more .Values.gpuResource (.Values.gpusPerNode | int | toString) }}
      {{- end }}
      resources:
        {{- include "qlora.resources" (merge (dict "more" $more) .Values.worker) | nindent 8 }}
      lifecycle:
        {{- include "qlora.lifecycle" (dict "root" . "waitsFor" "[r]ay::RayTrainWorker") | nindent 8 }}
      volumeMounts:
        {{- include "qlora.commonMounts" . | nindent 8 }}
        {{- include "qlora.runMounts" . | nindent 8 }}
        {{- if .Values.nvme.size }}
        - {name: nvme, mountPath: /nvme}
        {{- end }}
  volumes:
    {{- include "qlora.commonVolumes" . | nindent 4 }}
    - name: cache
      {{- include "qlora.workerCache" . | nindent 6 }}
    {{- include "qlora.runVolumes" . | nindent 4 }}
    {{- if .Values.nvme.size }}
    # local disks, which the head's node need not have
    - name: nvme
      {{- include "qlora.scratch" .Values.nvme | nindent 6 }}
    {{- end }}
{{- end -}}

{{/* On which nodes. Takes (dict "of" head or worker, "workers" the labels of workers, or nothing for the head). */}}
{{- define "qlora.where" -}}
{{- with .of.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- $affinity := merge dict .of.affinity }}
{{- if .workers }}
{{- $all := dict "matchLabels" (merge (dict "ray.io/node-type" "worker") .workers) }}
{{- with .of.sameTopology }}
{{- $term := dict "topologyKey" . "labelSelector" $all }}
{{- $_ := set $affinity "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) }}
{{- end }}
{{- with .of.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - {{ merge (dict "labelSelector" $all) . | toJson }}
  {{- end }}
{{- end }}
{{- end }}
{{- with $affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end -}}

{{/* Submits and then follows the run's output. It has no secret of the run: only the token that KubeRay gives it. */}}
{{- define "qlora.submitter" -}}
metadata:
  labels:
    {{- include "qlora.podLabels" . | nindent 4 }}
  {{- with .Values.podAnnotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  {{- include "qlora.podBasics" . | nindent 2 }}
  {{- with include "qlora.where" (dict "of" .Values.head) | trim }}{{ nindent 2 . }}{{ end }}
  containers:
    # without a command: KubeRay writes one around the entrypoint
    - name: ray-job-submitter
      {{- include "qlora.containerBasics" (dict "root" .) | nindent 6 }}
      env:
        {{- include "qlora.home" . | nindent 8 }}
        {{- include "qlora.rayToken" . | nindent 8 }}
      resources:
        {{- include "qlora.resources" .Values.submitter | nindent 8 }}
      volumeMounts:
        {{- include "qlora.commonMounts" . | nindent 8 }}
  volumes:
    {{- include "qlora.commonVolumes" . | nindent 4 }}
{{- end -}}
