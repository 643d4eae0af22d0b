// Package oci makes container images without a container engine, keeps them
// in OCI layout folders and serves such a folder as a registry.
package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// RegistryName is the host part of every image the nodes can pull.
const RegistryName = "lk.local"

const (
	mediaTypeIndex    = "application/vnd.oci.image.index.v1+json"
	mediaTypeManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaTypeConfig   = "application/vnd.oci.image.config.v1+json"
	mediaTypeLayer    = "application/vnd.oci.image.layer.v1.tar"

	annotationName = "io.containerd.image.name"
	annotationTag  = "org.opencontainers.image.ref.name"
)

// Reference is the full name of the image NAME:TAG.
func Reference(nameAndTag string) string { return RegistryName + "/" + nameAndTag }

// Descriptor points at a blob.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []Descriptor `json:"manifests"`
}

// Layout is an OCI layout folder. Its images are listed in one index; every
// change of it is whole, so that it can be served meanwhile.
type Layout struct{ dir string }

// OpenLayout makes the folder where there is none.
func OpenLayout(dir string) (Layout, error) {
	l := Layout{dir}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return l, fmt.Errorf("image layout: %w", err)
	}
	marker := filepath.Join(dir, "oci-layout")
	if _, err := os.Stat(marker); err == nil {
		return l, nil
	}
	if err := os.WriteFile(marker, []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		return l, fmt.Errorf("image layout: %w", err)
	}
	return l, nil
}

// ExistingLayout is a folder that must be one already.
func ExistingLayout(dir string) (Layout, error) {
	if _, err := os.Stat(filepath.Join(dir, "oci-layout")); err != nil {
		return Layout{}, fmt.Errorf("image layout: %w", err)
	}
	return Layout{dir}, nil
}

func (l Layout) blobPath(digest string) (string, error) {
	sum, ok := strings.CutPrefix(digest, "sha256:")
	if _, err := hex.DecodeString(sum); err != nil || !ok || len(sum) != 2*sha256.Size {
		return "", fmt.Errorf("image digest %q: want sha256: and 64 digits", digest)
	}
	return filepath.Join(l.dir, "blobs", "sha256", sum), nil
}

// addBlob stores what write writes under its digest.
func (l Layout) addBlob(mediaType string, write func(io.Writer) error) (Descriptor, error) {
	file, err := os.CreateTemp(l.dir, ".blob-*")
	if err != nil {
		return Descriptor{}, err
	}
	defer os.Remove(file.Name()) // gone already once it is stored
	defer file.Close()
	sum := sha256.New()
	if err := write(io.MultiWriter(file, sum)); err != nil {
		return Descriptor{}, err
	}
	size, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return Descriptor{}, err
	}
	if err := file.Chmod(0o644); err != nil {
		return Descriptor{}, err
	}
	descriptor := Descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum.Sum(nil)), Size: size}
	path, err := l.blobPath(descriptor.Digest)
	if err != nil {
		return Descriptor{}, err
	}
	return descriptor, os.Rename(file.Name(), path)
}

func (l Layout) addJSON(mediaType string, value any) (Descriptor, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return Descriptor{}, err
	}
	return l.addBlob(mediaType, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

func (l Layout) readIndex() (index, error) {
	list := index{SchemaVersion: 2, MediaType: mediaTypeIndex}
	text, err := os.ReadFile(filepath.Join(l.dir, "index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return list, nil
	}
	if err != nil {
		return list, err
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return list, fmt.Errorf("image index of %s: %w", l.dir, err)
	}
	return list, nil
}

// name lists a manifest under a name, in place of what had that name.
func (l Layout) name(reference string, manifest Descriptor) error {
	lock, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	list, err := l.readIndex()
	if err != nil {
		return err
	}
	list.Manifests = slices.DeleteFunc(list.Manifests, func(d Descriptor) bool {
		return d.Annotations[annotationName] == reference
	})
	_, tag := splitReference(reference)
	manifest.Annotations = map[string]string{annotationName: reference, annotationTag: tag}
	list.Manifests = append(list.Manifests, manifest)
	text, err := json.Marshal(list)
	if err != nil {
		return err
	}
	next := filepath.Join(l.dir, "index.json.next")
	if err := os.WriteFile(next, text, 0o644); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(l.dir, "index.json"))
}

// Find returns the manifest listed under a name.
func (l Layout) Find(reference string) (Descriptor, bool, error) {
	list, err := l.readIndex()
	if err != nil {
		return Descriptor{}, false, err
	}
	for _, manifest := range list.Manifests {
		if manifest.Annotations[annotationName] == reference {
			return manifest, true, nil
		}
	}
	return Descriptor{}, false, nil
}

// splitReference splits lk.local/NAME:TAG into NAME and TAG.
func splitReference(reference string) (name, tag string) {
	name = strings.TrimPrefix(reference, RegistryName+"/")
	name, tag, _ = strings.Cut(name, ":")
	return name, tag
}

// CopyFrom adds all images of another layout and returns their names. Blobs
// become links where both are on one file system.
func (l Layout) CopyFrom(source Layout) ([]string, error) {
	list, err := source.readIndex()
	if err != nil {
		return nil, err
	}
	blobs, err := filepath.Glob(filepath.Join(source.dir, "blobs", "sha256", "*"))
	if err != nil {
		return nil, err
	}
	for _, blob := range blobs {
		if err := linkOrCopy(blob, filepath.Join(l.dir, "blobs", "sha256", filepath.Base(blob))); err != nil {
			return nil, fmt.Errorf("copy image blob: %w", err)
		}
	}
	var names []string
	for _, manifest := range list.Manifests {
		reference := manifest.Annotations[annotationName]
		if reference == "" {
			continue
		}
		if err := l.name(reference, manifest); err != nil {
			return nil, fmt.Errorf("copy image %s: %w", reference, err)
		}
		names = append(names, reference)
	}
	return names, nil
}

func linkOrCopy(from, to string) error {
	err := os.Link(from, to)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.CreateTemp(filepath.Dir(to), ".blob-*")
	if err != nil {
		return err
	}
	defer os.Remove(target.Name())
	defer target.Close()
	if _, err := io.Copy(target, source); err != nil {
		return err
	}
	if err := target.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(target.Name(), to)
}
