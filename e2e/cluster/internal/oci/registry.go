package oci

import (
	"net/http"
	"os"
	"strings"
	"time"
)

// NewRegistry serves a layout folder, as it is at each request, to nodes that
// pull.
func NewRegistry(dir string) http.Handler {
	layout := Layout{dir}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	// A name may have slashes, so the rest of the path is split by hand.
	mux.HandleFunc("GET /v2/{rest...}", func(w http.ResponseWriter, r *http.Request) {
		rest := r.PathValue("rest")
		if at := strings.LastIndex(rest, "/manifests/"); at > 0 {
			layout.serveManifest(w, r, rest[:at], rest[at+len("/manifests/"):])
		} else if at := strings.LastIndex(rest, "/blobs/"); at > 0 {
			layout.serveBlob(w, r, rest[at+len("/blobs/"):], "application/octet-stream")
		} else {
			http.NotFound(w, r)
		}
	})
	return mux
}

func (l Layout) serveManifest(w http.ResponseWriter, r *http.Request, name, reference string) {
	digest := reference
	if !strings.HasPrefix(reference, "sha256:") {
		found, ok, err := l.Find(Reference(name + ":" + reference))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if !ok {
			http.NotFound(w, r)
			return
		}
		digest = found.Digest
	}
	l.serveBlob(w, r, digest, mediaTypeManifest)
}

func (l Layout) serveBlob(w http.ResponseWriter, r *http.Request, digest, mediaType string) {
	path, err := l.blobPath(digest)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	file, err := os.Open(path)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer file.Close()
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	http.ServeContent(w, r, "", time.Time{}, file)
}
