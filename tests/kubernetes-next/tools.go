//go:build tools

// Package kubernetes pins the kube-proxy of a later Kubernetes than that of the tests: what it takes for a configuration is
// what weir takes too. `cargo xtask setup` builds it by its import path.
package kubernetes

import (
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
