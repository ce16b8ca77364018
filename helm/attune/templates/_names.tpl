{{/* Name of the chart's objects. */}}
{{- define "attune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "attune.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := include "attune.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Cluster-wide names carry the namespace, so that two releases of one name don't meet. */}}
{{- define "attune.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "attune.fullname" .) }}
{{- end }}

{{- define "attune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "attune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "attune.labels" -}}
{{ include "attune.selectorLabels" . }}
app.kubernetes.io/part-of: attune
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "attune.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "attune.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "attune.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}
{{- end }}

{{- define "attune.trainerImage" -}}
{{ default (printf "ghcr.io/attune/trainer:%s" .Chart.AppVersion) .Values.trainer.image }}
{{- end }}

{{- define "attune.inferenceImage" -}}
{{ default (printf "ghcr.io/attune/inference:%s" .Chart.AppVersion) .Values.inference.image }}
{{- end }}

{{/* Name of the Lease that the replicas share. */}}
{{- define "attune.leaseName" -}}
{{ include "attune.fullname" . }}-operator
{{- end }}
