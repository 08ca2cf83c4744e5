{{- define "scaphoid.labels" -}}
app.kubernetes.io/name: scaphoid
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "scaphoid.allLabels" -}}
{{ include "scaphoid.labels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "scaphoid.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}-scaphoid
{{- end }}

{{- define "scaphoid.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/* Where an init container or the server finds what was exported or assembled. */}}
{{- define "scaphoid.models" -}}
- name: models
  mountPath: /artefacts
  readOnly: true
  {{- if eq .Values.models.source "pvc" }}
  subPath: {{ .Values.models.pvc.path | quote }}
  {{- end }}
{{- end }}
