{{/* The kind of role that gives what is watched: one namespace's, or all's. */}}
{{- define "herd.roleKind" -}}
{{- if .Values.watchNamespace }}Role{{ else }}ClusterRole{{ end -}}
{{- end -}}

{{/* A binding of a component's role to its ServiceAccount. Takes (list . "operator" NAME). */}}
{{- define "herd.roleBinding" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $name := index . 2 -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ include "herd.roleKind" $root }}Binding
metadata:
  name: {{ $name }}
  {{- with $root.Values.watchNamespace }}
  namespace: {{ . | quote }}
  {{- end }}
  labels:
    {{- include "herd.labels" (list $root $component) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ include "herd.roleKind" $root }}
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $root.Release.Namespace }}
{{- end -}}
