//! What calibration runs where nothing else is given: texts of several kinds, for activations differ with them.

/// Of a prompt; the rest is left out.
pub const MAX_PROMPT_TOKENS: usize = 256;
/// Of all prompts; what is beyond is left out.
pub const MAX_TOKENS: usize = 2048;

/// The built-in prompts.
pub const PROMPTS: [&str; 8] = [
    "The city lies where two rivers meet. Its oldest bridge was built in stone in the year 1345, and for four hundred years \
     every cart of salt, cloth and grain that crossed the valley paid its toll there. Today the tolls are gone, but on market \
     days the traders still put up their stalls along the parapet, and the bells of the cathedral still count the hours.",
    "User: What is the capital of Japan?\nAssistant: The capital of Japan is Tokyo.\nUser: And how many people live there?\n\
     Assistant: About fourteen million people live in Tokyo itself, and about thirty-seven million in its metropolitan area.\n\
     User: Which other cities are close to that size?\nAssistant:",
    "fn binary_search(values: &[u32], wanted: u32) -> Option<usize> {\n    let (mut low, mut high) = (0, values.len());\n    \
     while low < high {\n        let middle = low + (high - low) / 2;\n        match values[middle].cmp(&wanted) {\n            \
     Ordering::Less => low = middle + 1,\n            Ordering::Greater => high = middle,\n            Ordering::Equal => return \
     Some(middle),\n        }\n    }\n    None\n}\n",
    "{\"id\": 4711, \"customer\": {\"name\": \"A. Example\", \"address\": \"12 Main Street\"}, \"items\": [{\"sku\": \"X-100\", \
     \"count\": 3, \"price\": 19.99}, {\"sku\": \"Y-250\", \"count\": 1, \"price\": 149.0}], \"total\": 208.97, \"paid\": true, \
     \"currency\": \"EUR\", \"created\": \"2024-02-29T12:00:00Z\"}",
    "Solve step by step. A train leaves at 9:40 and arrives at 12:05. It covers 203 km. How fast does it go on average? First, \
     the time is 2 hours and 25 minutes, which is 145 minutes. Then 203 / 145 = 1.4 km a minute. Times 60 that is 84 km/h. So \
     the answer is 84 km/h. Now the same for a train that leaves at 23:50 and arrives at 01:20, over 135 km.",
    "Le chat dort sur la chaise près de la fenêtre. Der Hund wartet vor der Tür. El pájaro canta en el jardín todas las \
     mañanas. 猫は窓のそばで眠っています。 Кошка спит у окна. القطة نائمة. 고양이가 자고 있다. Translate each of these sentences into English.",
    "# Release notes\n\n## 2.1.0\n\n- **Added**: retries with exponential back-off for `GET` requests (default: 3).\n- **Fixed**: \
     a race between `close()` and a pending read, #1287.\n- **Changed**: the timeout is now 30 s, was 10 s.\n\n| option | \
     default | since |\n|---|---|---|\n| `retries` | 3 | 2.1.0 |\n| `timeout` | 30 | 1.0.0 |\n",
    "Abstract. We study the effect of temperature on the rate of a reversible first-order reaction in aqueous solution. \
     Measurements between 278 K and 338 K agree with the Arrhenius equation, with an activation energy of 52.3 kJ/mol. Above \
     this range the solvent begins to take part, and the apparent order rises. We discuss two mechanisms that account for it.",
];

/// As many tokens as are run, in prompts that fit a context.
pub(super) fn cut(prompts: &[Vec<u32>], context: usize) -> Vec<Vec<u32>> {
    let mut left = MAX_TOKENS;
    let mut kept = Vec::new();
    for prompt in prompts {
        let tokens = prompt.len().min(MAX_PROMPT_TOKENS).min(context).min(left);
        left -= tokens;
        if tokens > 0 {
            kept.push(prompt[..tokens].to_vec());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_bounded_one_by_one_and_all_together() {
        let lengths = |prompts: &[usize], context| {
            let prompts: Vec<_> = prompts.iter().map(|tokens| vec![0; *tokens]).collect();
            cut(&prompts, context).iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&[3, 0, 300, 5], 1000), [3, 256, 5]);
        assert_eq!(lengths(&[3, 300], 64), [3, 64]);
        assert_eq!(lengths(&[250; 10], 1000), [&[250; 8][..], &[48]].concat());
    }
}
