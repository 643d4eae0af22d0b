package main

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// newEtcdCommand is a single-member etcd on a client URL. Its data is a test
// cluster's: it is never synced to the disk.
func newEtcdCommand() *cobra.Command {
	var dataDir, listen string
	command := &cobra.Command{
		Use:           "etcd",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			return runEtcd(dataDir, listen)
		},
	}
	command.Flags().StringVar(&dataDir, "data-dir", "", "folder of the data")
	command.Flags().StringVar(&listen, "listen-client-url", "http://127.0.0.1:2379", "where clients connect")
	return command
}

func runEtcd(dataDir, listen string) error {
	client, err := url.Parse(listen)
	if err != nil {
		return fmt.Errorf("client url %q: %w", listen, err)
	}
	config := embed.NewConfig()
	config.Dir = dataDir
	config.LogLevel = "warn"
	config.UnsafeNoFsync = true
	config.ListenClientUrls = []url.URL{*client}
	config.AdvertiseClientUrls = []url.URL{*client}
	server, err := embed.StartEtcd(config)
	if err != nil {
		return fmt.Errorf("etcd in %s: %w", dataDir, err)
	}
	defer server.Close()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-stop:
		return nil
	case err := <-server.Err():
		return fmt.Errorf("etcd in %s: %w", dataDir, err)
	}
}
