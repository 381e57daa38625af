//go:build tools

// Package etcd pins the etcd that the tests run beside kube-apiserver: one new enough that lists can be streamed.
// `cargo xtask setup` builds the main package by its import path.
package etcd

import _ "go.etcd.io/etcd/server/v3"
