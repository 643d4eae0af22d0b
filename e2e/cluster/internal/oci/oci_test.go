package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestSameContentHasSameImage(t *testing.T) {
	var digests []string
	for range 2 {
		content := t.TempDir()
		write(t, filepath.Join(content, "b", "two"), "2")
		write(t, filepath.Join(content, "a"), "1")
		if err := os.Chtimes(filepath.Join(content, "a"), time.Time{}, time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		layout := newLayout(t)
		add(t, layout, Image{Name: "x:1", Layers: []Source{{content, "/"}, {filepath.Join(content, "a"), "/usr/bin/a"}}})
		found, ok, err := layout.Find(Reference("x:1"))
		if err != nil || !ok {
			t.Fatalf("find: %t, %v", ok, err)
		}
		digests = append(digests, found.Digest)
	}
	if digests[0] != digests[1] {
		t.Errorf("two images of the same content are %v", digests)
	}
}

func TestAFilesParentsAreInItsLayer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "program")
	write(t, file, "text")
	var layer bytes.Buffer
	if err := (Source{file, "/usr/bin/tool"}).writeTo(&layer); err != nil {
		t.Fatal(err)
	}
	var names []string
	for reader := tar.NewReader(&layer); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
	}
	if want := []string{"usr/", "usr/bin/", "usr/bin/tool"}; !slices.Equal(names, want) {
		t.Errorf("the layer has %v, want %v", names, want)
	}
}

func TestRegistryServesWhatWasCopiedIn(t *testing.T) {
	content := t.TempDir()
	write(t, filepath.Join(content, "file"), "text")
	source, served := newLayout(t), newLayout(t)
	registry := httptest.NewServer(NewRegistry(served.dir))
	defer registry.Close()

	if status, _ := fetch(t, registry.URL+"/v2/team/x/manifests/1"); status != http.StatusNotFound {
		t.Errorf("an image that is not there: status %d", status)
	}
	add(t, source, Image{Name: "team/x:1", Layers: []Source{{content, "/"}}})
	if _, err := served.CopyFrom(source); err != nil {
		t.Fatal(err)
	}
	status, body := fetch(t, registry.URL+"/v2/team/x/manifests/1")
	var image manifest
	if err := json.Unmarshal(body, &image); err != nil || len(image.Layers) != 1 {
		t.Fatalf("status %d, manifest %s", status, body)
	}
	status, body = fetch(t, registry.URL+"/v2/team/x/blobs/"+image.Layers[0].Digest)
	if status != http.StatusOK || int64(len(body)) != image.Layers[0].Size {
		t.Errorf("layer: status %d, %d bytes of %d", status, len(body), image.Layers[0].Size)
	}
	if status, _ := fetch(t, registry.URL+"/v2/x/blobs/sha256:..%2f..%2findex.json"); status != http.StatusBadRequest {
		t.Errorf("a path for a digest: status %d", status)
	}
}

func newLayout(t *testing.T) Layout {
	t.Helper()
	layout, err := OpenLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return layout
}

func add(t *testing.T, layout Layout, image Image) {
	t.Helper()
	if _, err := layout.Add(image); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func fetch(t *testing.T, url string) (int, []byte) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, body
}
