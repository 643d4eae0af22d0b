//! `GET /v1/models`.

use serde_json::{Value, json};

use crate::fleet::ListedModel;

/// The list in OpenAI's form, with what vLLM's clients look for.
pub(crate) fn list(models: Vec<ListedModel>, created: u64) -> Value {
    let data: Vec<Value> = models.into_iter().map(|model| one(model, created)).collect();
    json!({"object": "list", "data": data})
}

/// One model of it.
pub(crate) fn one(model: ListedModel, created: u64) -> Value {
    let ListedModel { name, digest, context_length, ready_gangs } = model;
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "herd",
        "root": name,
        "parent": null,
        "max_model_len": context_length,
        "digest": digest,
        "ready_gangs": ready_gangs,
    })
}
