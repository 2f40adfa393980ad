// Package main is the Kubernetes that the tests run on: one program that is each of a cluster's processes, by the name
// under which it is called (kube-apiserver, kubelet, kubectl, coredns ...).
//
// One program, because they share most of their code: it compiles and links once.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// Each returns when its process is to end; a returned error is printed.
var programs = map[string]func() error{
	"coredns":                 dns,
	"etcd":                    func() error { etcdmain.Main(os.Args); return nil },
	"image":                   func() error { return image(os.Args[1:]) },
	"kube-apiserver":          func() error { return run(apiserver.NewAPIServerCommand()) },
	"kube-controller-manager": func() error { return run(controllermanager.NewControllerManagerCommand()) },
	"kube-proxy":              func() error { return run(proxy.NewProxyCommand()) },
	"kube-scheduler":          func() error { return run(scheduler.NewSchedulerCommand()) },
	"kubectl":                 runKubectl,
	"kubelet":                 func() error { return run(kubelet.NewKubeletCommand(context.Background())) },
	"provisioner":             func() error { return provision(os.Args[1:]) },
	"tunnel":                  func() error { return tunnel(os.Args[1:]) },
}

func main() {
	name := filepath.Base(os.Args[0])
	program, found := programs[name]
	if !found {
		// `birb-cluster NAMES` tells the harness which links to make.
		fmt.Println(strings.Join(names(), "\n"))
		return
	}
	if err := program(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func names() []string {
	var names []string
	for name := range programs {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// The command prints its own errors.
func run(command *cobra.Command) error {
	if code := cli.Run(command); code != 0 {
		os.Exit(code)
	}
	return nil
}

func runKubectl() error {
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err)
	}
	return nil
}
