package oci

import (
	"fmt"
	"runtime"
	"strings"
)

// Image is what to make an image from.
type Image struct {
	// Name is NAME:TAG; the registry's name goes before it.
	Name       string
	Layers     []Source
	Entrypoint []string
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        Descriptor   `json:"config"`
	Layers        []Descriptor `json:"layers"`
}

type config struct {
	Architecture string    `json:"architecture"`
	OS           string    `json:"os"`
	Config       execution `json:"config"`
	RootFS       rootFS    `json:"rootfs"`
}

type execution struct {
	Entrypoint []string `json:"Entrypoint,omitempty"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

// Add makes an image in the layout and returns its full name. Layers are not
// compressed: nodes are near and keep them unpacked too.
func (l Layout) Add(image Image) (string, error) {
	if name, tag, _ := strings.Cut(image.Name, ":"); name == "" || tag == "" {
		return "", fmt.Errorf("image %q: want NAME:TAG", image.Name)
	}
	reference := Reference(image.Name)
	platform := platform{Architecture: runtime.GOARCH, OS: "linux"}
	configuration := config{
		Architecture: platform.Architecture,
		OS:           platform.OS,
		Config:       execution{Entrypoint: image.Entrypoint},
		RootFS:       rootFS{Type: "layers", DiffIDs: []string{}},
	}
	content := manifest{
		SchemaVersion: 2,
		MediaType:     mediaTypeManifest,
		Layers:        []Descriptor{},
	}
	for _, source := range image.Layers {
		layer, err := l.addBlob(mediaTypeLayer, source.writeTo)
		if err != nil {
			return "", fmt.Errorf("image %s: %w", reference, err)
		}
		content.Layers = append(content.Layers, layer)
		// An uncompressed layer's content is its blob.
		configuration.RootFS.DiffIDs = append(configuration.RootFS.DiffIDs, layer.Digest)
	}
	var err error
	if content.Config, err = l.addJSON(mediaTypeConfig, configuration); err != nil {
		return "", fmt.Errorf("image %s: %w", reference, err)
	}
	descriptor, err := l.addJSON(mediaTypeManifest, content)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", reference, err)
	}
	descriptor.Platform = &platform
	if err := l.name(reference, descriptor); err != nil {
		return "", fmt.Errorf("image %s: %w", reference, err)
	}
	return reference, nil
}
