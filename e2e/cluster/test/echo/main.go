// Command echo is what the tests run in pods: it says which pod it is, and
// tells what the pod can resolve, reach and read.
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	client := &http.Client{
		Timeout: 5 * time.Second,
		// A new connection each time, so that each may have another endpoint.
		Transport: &http.Transport{DisableKeepAlives: true},
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, os.Getenv("POD"), nil)
	})
	http.HandleFunc("/resolve", func(w http.ResponseWriter, r *http.Request) {
		addresses, err := net.DefaultResolver.LookupHost(r.Context(), r.FormValue("name"))
		answer(w, strings.Join(addresses, " "), err)
	})
	http.HandleFunc("/fetch", func(w http.ResponseWriter, r *http.Request) {
		response, err := client.Get(r.FormValue("url"))
		if err != nil {
			answer(w, "", err)
			return
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		answer(w, string(body), err)
	})
	http.HandleFunc("/read", func(w http.ResponseWriter, r *http.Request) {
		content, err := os.ReadFile(r.FormValue("file"))
		answer(w, string(content), err)
	})
	log.Print("listening")
	log.Fatal(http.ListenAndServe(":8080", nil))
}

func answer(w http.ResponseWriter, text string, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	fmt.Fprint(w, text)
}
