{{/* A Service's name begins with a letter and has no dot; a release's may be otherwise. */}}
{{- define "birb-nest.fullname" -}}
{{- $release := .Release.Name | replace "." "-" | trimSuffix "-operator" -}}
{{- if regexMatch "^[0-9]" $release }}{{ $release = printf "birb-nest-%s" $release }}{{ end -}}
{{- .Values.fullnameOverride | default (printf "%s-operator" ($release | trunc 54 | trimSuffix "-")) -}}
{{- end }}

{{- define "birb-nest.selectorLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default "birb-nest-operator" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "birb-nest.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "birb-nest.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: birb-nest
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "birb-nest.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "birb-nest.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* The operator's image. */}}
{{- define "birb-nest.image" -}}
{{- with .Values.image -}}
{{ .registry }}/{{ .repository }}
{{- if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end }}

{{/* An image of nests: (list $ .Values.nestImages.redis). The data plane's has no tag. */}}
{{- define "birb-nest.nestImage" -}}
{{- $root := index . 0 -}}
{{- with index . 1 -}}
{{ $root.Values.nestImages.mirror | default .registry | trimSuffix "/" }}/{{ .repository }}{{ with .tag }}:{{ . }}{{ end }}
{{- end -}}
{{- end }}
