//go:build tools

// Package kubernetes pins the Kubernetes programs that the tests run: this module exists for its go.mod and go.sum,
// `cargo xtask setup` builds the two main packages by their import path.
package kubernetes

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
