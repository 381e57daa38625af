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

{{- /* With the namespace, because these objects are cluster-wide and a release in another namespace may have the same name. */ -}}
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

{{- /* The name contains a hash of the content, so that running pods keep their configuration and a changed one is rolled out. */ -}}
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

{{- /* In the form of `--master`. */ -}}
{{- define "weir.apiServers" -}}
{{ .Values.apiServers | join "," | default .Values.apiServer }}
{{- end }}

{{- /* `dns` was a boolean in earlier versions, and the kept values of a release may still have that. */ -}}
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

{{- /* Whether the socket plane may run. If not, the pods request nothing that only it needs. */ -}}
{{- define "weir.ebpf" -}}
{{ if ne .Values.proxyMode "nftables" }}true{{ end }}
{{- end }}

{{- /*
nftables, connection tracking and their socket buffers need NET_ADMIN. Loading the kernel programs needs BPF and PERFMON.
Entering pods' network namespaces, to close sockets of removed backends, needs SYS_ADMIN.
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

{{- /* A privileged container has all capabilities and no profile, and the API server rejects some other settings with it. */ -}}
{{- define "weir.securityContext" -}}
{{- if .Values.securityContext.privileged }}
{{- omit .Values.securityContext "allowPrivilegeEscalation" "seLinuxOptions" "seccompProfile" | toYaml }}
{{- else -}}
capabilities: {drop: [ALL], add: {{ include "weir.capabilities" . }}}
{{ toYaml .Values.securityContext }}
{{- end }}
{{- end }}

{{- /* The port of an address in the form of kube-proxy's configuration. In: list of address and default port. */ -}}
{{- define "weir.port" -}}
{{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" (index . 0)) | default (index . 1) }}
{{- end }}

{{- /* The address for the kubelet's probes: the node's, or the one that the health server is bound to. */ -}}
{{- define "weir.probe" -}}
{{- $address := .Values.config.healthzBindAddress | default "" -}}
{{- $host := regexReplaceAll ":[0-9]+$" $address "" | trimPrefix "[" | trimSuffix "]" -}}
{{- if and $host (ne $host "0.0.0.0") (ne $host "::") }}
host: {{ $host | quote }}
{{- end }}
port: {{ include "weir.port" (list $address 10256) }}
{{- end }}
