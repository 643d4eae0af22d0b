{{/* The release's name, with the chart's where that does not hold it: "herd", "prod-herd". */}}
{{- define "herd.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "herd.operator" -}}{{ include "herd.fullname" . }}-operator{{- end -}}

{{- define "herd.gateway" -}}{{ include "herd.fullname" . }}-gateway{{- end -}}

{{- define "herd.modelCache" -}}{{ include "herd.fullname" . }}-model-cache{{- end -}}

{{/* What finds a component's pods; it never changes. Takes (list . "operator"). */}}
{{- define "herd.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* On every object of a component. Takes (list . "operator"). */}}
{{- define "herd.labels" -}}
{{- $root := index . 0 -}}
{{ include "herd.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: herd
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image that must be given. Takes (list . "operator"). */}}
{{- define "herd.image" -}}
{{- $name := index . 1 -}}
{{- $message := printf "images.%s is required: give the full reference with --set images.%s=REGISTRY/herd-%s:TAG (cargo xtask images builds the images and prints the references)" $name $name $name -}}
{{- required $message (index (index . 0).Values.images $name) -}}
{{- end -}}
