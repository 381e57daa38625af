//go:build tools

// Package tools pins what the chart is checked with: helm, kubeconform, and the definition of PodMonitor.
package tools

import (
	_ "github.com/prometheus-operator/prometheus-operator/pkg/versionutil"
	_ "github.com/yannh/kubeconform/cmd/kubeconform"
	_ "helm.sh/helm/v4/cmd/helm"
)
