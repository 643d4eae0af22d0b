package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
	deviceplugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	// gpusVariable says how many GPUs a kubelet's node is to have.
	gpusVariable = "HERD_FAKE_GPUS"
	gpuResource  = "nvidia.com/gpu"
	gpuSocket    = "herd-fake-gpus.sock"
	// gpuPoll is how often the plugin looks whether the kubelet started anew,
	// which empties the folder of the sockets.
	gpuPoll            = time.Second
	gpuRegisterTimeout = 5 * time.Second
)

// serveGPUs is a device plugin for devices that are names only. It speaks the
// kubelet's own protocol, from inside the kubelet's process: one of its own
// would take 100 MB on each node.
func serveGPUs() {
	count, err := strconv.Atoi(os.Getenv(gpusVariable))
	if err != nil || count < 1 {
		return
	}
	var registered uint64 // the inode of the kubelet's socket
	var server *grpc.Server
	for ; ; time.Sleep(gpuPoll) {
		kubelet, err := inode(deviceplugin.KubeletSocket)
		if err != nil {
			continue // it has not begun to listen
		}
		if _, err := inode(filepath.Join(deviceplugin.DevicePluginPath, gpuSocket)); err == nil && kubelet == registered {
			continue
		}
		if server != nil {
			server.Stop()
		}
		if server, err = startGPUs(count); err == nil {
			err = registerGPUs()
		}
		if err != nil {
			klog.ErrorS(err, "Fake GPUs are not registered")
			continue
		}
		registered = kubelet
		klog.InfoS("Fake GPUs are registered", "count", count)
	}
}

func inode(path string) (uint64, error) {
	var stat syscall.Stat_t
	err := syscall.Stat(path, &stat)
	return stat.Ino, err
}

func startGPUs(count int) (*grpc.Server, error) {
	path := filepath.Join(deviceplugin.DevicePluginPath, gpuSocket)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer()
	deviceplugin.RegisterDevicePluginServer(server, gpus{count: count})
	go server.Serve(listener)
	return server, nil
}

func registerGPUs() error {
	connection, err := grpc.NewClient("unix://"+deviceplugin.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), gpuRegisterTimeout)
	defer cancel()
	_, err = deviceplugin.NewRegistrationClient(connection).Register(ctx, &deviceplugin.RegisterRequest{
		Version:      deviceplugin.Version,
		Endpoint:     gpuSocket,
		ResourceName: gpuResource,
	})
	return err
}

type gpus struct {
	deviceplugin.UnimplementedDevicePluginServer
	count int
}

func (g gpus) GetDevicePluginOptions(context.Context, *deviceplugin.Empty) (*deviceplugin.DevicePluginOptions, error) {
	return &deviceplugin.DevicePluginOptions{}, nil
}

// ListAndWatch names all devices once: none of them ever fails.
func (g gpus) ListAndWatch(_ *deviceplugin.Empty, stream grpc.ServerStreamingServer[deviceplugin.ListAndWatchResponse]) error {
	var devices []*deviceplugin.Device
	for n := range g.count {
		devices = append(devices, &deviceplugin.Device{ID: fmt.Sprintf("GPU-%d", n), Health: deviceplugin.Healthy})
	}
	if err := stream.Send(&deviceplugin.ListAndWatchResponse{Devices: devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Allocate tells a container which devices are its own, as NVIDIA's plugin does.
func (g gpus) Allocate(_ context.Context, request *deviceplugin.AllocateRequest) (*deviceplugin.AllocateResponse, error) {
	response := &deviceplugin.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &deviceplugin.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}
