//! Published templates and prompts of Llama 3, richer than what is served yet.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{ChatTemplate, Segment};
use crate::vocabulary::AddedToken;
use crate::{TextError, TextModel, reference};

const CONTROL: [&str; 9] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
    "<|image|>",
];

/// 2026-11-24, the day of `chat-templates/cases.json`.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(498_744)
}

fn template(source: &str) -> ChatTemplate {
    let added: Vec<AddedToken> = CONTROL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            serde_json::from_value(json!({"id": id, "content": content, "special": true})).unwrap()
        })
        .collect();
    ChatTemplate::new(source, [("bos_token", CONTROL[0])].into_iter(), &added).unwrap()
}

fn text_of(segments: &[Segment]) -> String {
    let text = |segment: &Segment| match segment {
        Segment::Control(id) => CONTROL[*id as usize].to_owned(),
        Segment::Text(text) => text.clone(),
    };
    segments.iter().map(text).collect()
}

#[test]
fn published_templates_render_as_jinja2_does() {
    let Some(cases) = reference::reference("chat-templates/cases.json") else { return };
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    assert_eq!(cases.len(), 30);
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let source = reference::reference(&format!("chat-templates/{name}")).unwrap();
        let template = template(std::str::from_utf8(&source).unwrap());
        assert_eq!(case["now"], "2026-11-24");
        let rendered = template.render(case["input"].as_object().unwrap(), now());
        let place = format!("{name}, case {}", case["case"]);
        match case.get("error") {
            Some(error) => {
                let TextError::Render(reason) = rendered.unwrap_err() else { panic!("{place}") };
                let expected = error.as_str().unwrap().trim_start_matches("TemplateError: ");
                assert!(reason.starts_with(expected), "{place}: {reason}");
            }
            None => assert_eq!(text_of(&rendered.unwrap()), case["rendered"].as_str().unwrap(), "{place}"),
        }
    }
}

/// The prompt format of Meta's `llama-models`, in which the reference's dialogs are written.
const PROMPT_FORMAT: &str = r#"{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- if call.tool_name == 'code_interpreter' %}
            {{- '<|python_tag|>' + call.arguments.code }}
        {%- else %}
            {{- call.tool_name + '.call(' }}
            {%- for name, value in call.arguments | items %}
                {{- name + '="' + value + '"' }}{{ '' if loop.last else ', ' }}
            {%- endfor %}
            {{- ')' }}
        {%- endif %}
    {%- endfor %}
    {{- '<|eom_id|>' if message.stop_reason == 'end_of_message' else '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"#;

#[test]
fn dialogs_become_the_ids_that_metas_own_code_makes() {
    let Some(dialogs) = reference::reference("llama31-tokenizer/dialogs.json") else { return };
    let Some(files) = reference::llama31(PROMPT_FORMAT) else { return };
    let model = TextModel::from_files(&files).unwrap();
    let dialogs: Vec<Value> = serde_json::from_slice(&dialogs).unwrap();
    assert_eq!(dialogs.len(), 9);
    for (index, dialog) in dialogs.iter().enumerate() {
        let input = json!({"messages": dialog["messages"], "add_generation_prompt": true});
        let segments = model.chat.as_ref().unwrap().render(input.as_object().unwrap(), now()).unwrap();
        let ids = model.encode_segments(&segments).unwrap();
        assert_eq!(json!(ids), dialog["ids"], "dialog {index}");
    }
}
