//! Messages -> text and control tokens, by the model's own chat template.

mod environment;
mod marks;
mod strftime;
mod tojson;

#[cfg(test)]
mod published_templates_test;

use std::time::SystemTime;

use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use self::environment::Bounded;
use self::marks::Marks;
use crate::TextError;
use crate::vocabulary::AddedToken;

/// Bytes of text that a chat may render to.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;

/// What [`Message::role`] may be. `developer` is the newer name of `system` and is rendered as it.
pub const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// One of [`ROLES`].
    pub role: String,
    /// Any text; no part of it becomes a control token.
    pub content: String,
}

/// A stretch of a rendered chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// A control token that the template wrote.
    Control(u32),
    /// Everything between two of them, to be tokenized as a whole. It may contain the literal of a control token, if a user
    /// wrote it.
    Text(String),
}

/// A compiled chat template.
///
/// Not the user's literals are guarded but the template's own are marked: before the template is compiled, each literal of a
/// control token in its source becomes a mark, two private-use characters of which the first does not occur in the messages.
/// So whatever the template does with a user's text (trims it, changes its case, looks into it, joins it with other text),
/// it is the text as the user wrote it, and a mark in the output can only come from the template.
pub(crate) struct ChatTemplate {
    source: String,
    /// `bos_token` and the like.
    named: Vec<(&'static str, String)>,
    marks: Marks,
    compiled: Compiled,
}

/// The template with one choice of mark.
struct Compiled {
    mark: char,
    environment: Environment<'static>,
    named: Vec<(&'static str, String)>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source` and refuses a template that makes control tokens out of parts, which could not be told from a
    /// user's text.
    pub(crate) fn new<'a>(
        source: &str,
        named: impl Iterator<Item = (&'static str, &'a str)>,
        added: &[AddedToken],
    ) -> Result<Self, TextError> {
        let named: Vec<_> = named.map(|(name, text)| (name, text.to_owned())).collect();
        let marks = Marks::new(added);
        // Jinja2 reads all line ends alike.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mark = marks::unused([source.as_str()]).ok_or_else(|| {
            TextError::BadTemplate("it uses every private-use character of plane 16".to_owned())
        })?;
        let compiled = Compiled::new(&source, &named, &marks, mark)?;
        let template = Self { source, named, marks, compiled };
        template.refuse_composed_control_tokens()?;
        Ok(template)
    }

    /// The prompt for the assistant's next message.
    pub(crate) fn render_messages(
        &self,
        messages: &[Message],
        now: SystemTime,
    ) -> Result<Vec<Segment>, TextError> {
        if messages.is_empty() {
            return Err(TextError::NoMessages);
        }
        let mut list = Vec::with_capacity(messages.len());
        for (index, Message { role, content }) in messages.iter().enumerate() {
            if !ROLES.contains(&role.as_str()) {
                return Err(TextError::BadRole { index, role: role.chars().take(40).collect() });
            }
            let role = if role == "developer" { "system" } else { role };
            list.push(json!({"role": role, "content": content}));
        }
        let mut input = Map::new();
        input.insert("messages".to_owned(), list.into());
        input.insert("add_generation_prompt".to_owned(), true.into());
        self.render(&input, now)
    }

    /// Renders with any variables; all strings in them are a user's.
    pub(crate) fn render(
        &self,
        input: &Map<String, serde_json::Value>,
        now: SystemTime,
    ) -> Result<Vec<Segment>, TextError> {
        let mut strings = Vec::new();
        marks::strings_of(input, &mut strings);
        let recompiled;
        let compiled = if strings.iter().any(|text| text.contains(self.compiled.mark)) {
            strings.push(&self.source);
            let mark = marks::unused(strings).ok_or_else(|| {
                TextError::Render("they use every private-use character of plane 16".to_owned())
            })?;
            recompiled = Compiled::new(&self.source, &self.named, &self.marks, mark)?;
            &recompiled
        } else {
            &self.compiled
        };

        let named = compiled.named.iter().map(|(name, text)| (*name, Value::from(text.as_str())));
        let functions = [("strftime_now", environment::strftime_now(now))];
        let input = input.iter().map(|(name, value)| (name.as_str(), environment::value(value)));
        let variables = Value::from_pairs(named.chain(functions).chain(input));

        let mut output = Bounded::new(MAX_RENDERED_BYTES);
        let template = compiled.environment.get_template(NAME).map_err(|error| failed(&error))?;
        let rendered = template.render_captured_to(variables, &mut output);
        if output.is_over() {
            return Err(TextError::RenderedTooLarge { limit: MAX_RENDERED_BYTES });
        }
        rendered.map_err(|error| failed(&error))?;
        let text = output.into_string().map_err(|error| TextError::Render(error.to_string()))?;
        self.marks
            .split(&text, compiled.mark)
            .ok_or_else(|| TextError::Render("the template takes its own control tokens apart".to_owned()))
    }

    fn refuse_composed_control_tokens(&self) -> Result<(), TextError> {
        for roles in [&["user"][..], &["system", "user"], &["system", "user", "assistant", "user"]] {
            let messages: Vec<_> = roles
                .iter()
                .map(|&role| Message { role: role.to_owned(), content: "x".to_owned() })
                .collect();
            // A template may refuse a role; that is for the request to hear.
            let Ok(segments) = self.render_messages(&messages, SystemTime::UNIX_EPOCH) else { continue };
            for segment in &segments {
                if let Segment::Text(text) = segment
                    && let Some(literal) = self.marks.literal_in(text)
                {
                    return Err(TextError::BadTemplate(format!(
                        "it makes the control token {literal:?} out of parts; it must be written whole"
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Compiled {
    fn new(
        source: &str,
        named: &[(&'static str, String)],
        marks: &Marks,
        mark: char,
    ) -> Result<Self, TextError> {
        let compile = || {
            let mut environment = environment::new()?;
            environment.add_template_owned(NAME, marks.apply(source, mark))?;
            Ok(environment)
        };
        let environment = compile().map_err(|error| TextError::BadTemplate(sentence(&error)))?;
        let named = named.iter().map(|(name, text)| (*name, marks.apply(text, mark))).collect();
        Ok(Self { mark, environment, named })
    }
}

fn failed(error: &minijinja::Error) -> TextError {
    TextError::Render(match error.kind() {
        ErrorKind::OutOfFuel => "they need more work than a chat may".to_owned(),
        _ => sentence(error),
    })
}

/// The innermost cause, in one line.
fn sentence(error: &minijinja::Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    match error.line() {
        Some(line) => format!("{text} (line {line} of the template)"),
        None => text,
    }
}
