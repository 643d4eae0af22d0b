//! Grammars, which come from clients: a letter for the kind, then its text.

use std::sync::LazyLock;

use herd_engine::Constraint as _;
use herd_grammar::{Compiler, Grammar};
use herd_text::{BundleFiles, Vocabulary};

/// Tokens of a choice that are looked at.
const TOKENS: usize = 6;

/// Of a model of the tests.
static COMPILER: LazyLock<Option<Compiler>> = LazyLock::new(|| {
    let mut files = BundleFiles::default();
    files.insert("config.json", crate::seeds::CONFIG.to_vec());
    files.insert("tokenizer.json", crate::seeds::TOKENIZER.to_vec());
    Compiler::new(&Vocabulary::from_files(&files).ok()?).ok()
});

/// Compiles a grammar and follows it for some tokens. False: it is refused.
pub(crate) fn follow(bytes: &[u8]) -> bool {
    let (Some(compiler), Some((kind, text))) = (&*COMPILER, bytes.split_first()) else { return false };
    let text = String::from_utf8_lossy(text).into_owned();
    let grammar = match kind % 3 {
        0 => Grammar::Lark(text),
        1 => Grammar::JsonSchema(text),
        _ => Grammar::Regex(text),
    };
    let Ok(mut constraint) = compiler.compile(&grammar).and_then(|compiled| compiled.constraint(&[])) else {
        return false;
    };
    for _ in 0..TOKENS {
        // It may come to its end, or to one of its bounds.
        let Ok(allowed) = constraint.allowed() else { break };
        let Some(next) = (0..compiler.vocab_size() as u32).rfind(|id| allowed.contains(*id)) else { break };
        if constraint.advance(next).is_err() {
            break;
        }
    }
    true
}
