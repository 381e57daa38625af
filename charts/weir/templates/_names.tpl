{{- define "weir.selector" -}}
app.kubernetes.io/name: weir
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weir.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{ include "weir.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "weir.fullname" -}}
{{ .Values.fullnameOverride | default .Release.Name }}
{{- end }}

{{- define "weir.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "weir.fullname" .) }}
{{- end }}

{{- /* Of the whole cluster, so that a release of the same name in another namespace has others. */ -}}
{{- define "weir.clusterRole" -}}
{{ .Release.Namespace }}:{{ include "weir.fullname" . }}
{{- end }}

{{- define "weir.configuration" -}}
{{- $fixed := dict
      "apiVersion" "kubeproxy.config.k8s.io/v1alpha1"
      "kind" "KubeProxyConfiguration"
      "mode" .Values.proxyMode
      "metricsBindAddress" .Values.metrics.bindAddress }}
{{- with .Values.clusterCIDR }}
{{- $_ := set $fixed "clusterCIDR" (join "," .) }}
{{- end }}
{{- mergeOverwrite (deepCopy .Values.config) $fixed | toYaml }}
{{- end }}

{{- /* Named by its content, so that pods keep the configuration that they were made for, and another one is a rollout. */ -}}
{{- define "weir.configMap" -}}
{{ include "weir.fullname" . }}-{{ include "weir.configuration" . | sha256sum | trunc 10 }}
{{- end }}

{{- define "weir.image" -}}
{{- with .Values.image.digest -}}
{{ $.Values.image.repository }}@{{ . }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* As `--master` has them. */ -}}
{{- define "weir.apiServers" -}}
{{ .Values.apiServers | join "," | default .Values.apiServer }}
{{- end }}

{{- /* `dns` was a boolean once, and values that a release keeps may still say so. */ -}}
{{- define "weir.dns" -}}
{{- if kindIs "bool" .Values.dns }}
enabled: {{ .Values.dns }}
{{- else }}
{{- toYaml .Values.dns }}
{{- end }}
{{- end }}

{{- define "weir.dnsArgs" -}}
{{- with include "weir.dns" . | fromYaml }}
{{- if .enabled }}
- --dns
{{- with .domain }}
- --dns-domain={{ . }}
{{- end }}
{{- with .service }}
- --dns-service={{ . }}
{{- end }}
{{- with .address }}
- --dns-address={{ . }}
{{- end }}
{{- with .upstream }}
- --dns-upstream={{ join "," . }}
{{- end }}
{{- with .clients }}
- --dns-clients={{ join "," . }}
{{- end }}
{{- with .rate }}
- --dns-rate={{ int . }}
{{- end }}
{{- if hasKey . "ttl" }}
- --dns-ttl={{ int .ttl }}
{{- end }}
{{- if hasKey . "pods" }}
- --dns-pods={{ .pods }}
{{- end }}
{{- if hasKey . "topology" }}
- --dns-topology={{ .topology }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Whether the eBPF data plane may serve; nothing that only it needs is asked for otherwise. */ -}}
{{- define "weir.ebpf" -}}
{{ if ne .Values.proxyMode "nftables" }}true{{ end }}
{{- end }}

{{- /*
nftables, connection tracking and their socket buffers ask for NET_ADMIN. BPF and PERFMON load the kernel programs; SYS_ADMIN
enters pods' network namespaces to close sockets whose backend is gone.
*/ -}}
{{- define "weir.capabilities" -}}
{{- $default := list "NET_ADMIN" }}
{{- if include "weir.ebpf" . }}
{{- $default = list "NET_ADMIN" "BPF" "PERFMON" "SYS_ADMIN" }}
{{- end }}
{{- if include "weir.dnsArgs" . }}
{{- $default = append $default "NET_BIND_SERVICE" }}
{{- end }}
{{- .Values.capabilities | default $default | toJson }}
{{- end }}

{{- /* A privileged container has all capabilities and no profile, and the API server refuses some of the rest beside it. */ -}}
{{- define "weir.securityContext" -}}
{{- if .Values.securityContext.privileged }}
{{- omit .Values.securityContext "allowPrivilegeEscalation" "seLinuxOptions" "seccompProfile" | toYaml }}
{{- else -}}
capabilities: {drop: [ALL], add: {{ include "weir.capabilities" . }}}
{{ toYaml .Values.securityContext }}
{{- end }}
{{- end }}

{{- /* The port of an address as kube-proxy's configuration has it. In: list of address and default port. */ -}}
{{- define "weir.port" -}}
{{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" (index . 0)) | default (index . 1) }}
{{- end }}

{{- /* Whom the kubelet asks about health: this node's address, or the one that health is bound to. */ -}}
{{- define "weir.probe" -}}
{{- $address := .Values.config.healthzBindAddress | default "" -}}
{{- $host := regexReplaceAll ":[0-9]+$" $address "" | trimPrefix "[" | trimSuffix "]" -}}
{{- if and $host (ne $host "0.0.0.0") (ne $host "::") }}
host: {{ $host | quote }}
{{- end }}
port: {{ include "weir.port" (list $address 10256) }}
{{- end }}
