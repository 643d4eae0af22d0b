//! A request's name in logs, headers and calls to gangs.

/// Longest name taken from a client.
const MAX_BYTES: usize = 128;

/// The first usable one that the client gave, else a new one.
pub(crate) fn choose<'a>(given: impl IntoIterator<Item = Option<&'a str>>) -> String {
    let usable =
        |id: &&str| !id.is_empty() && id.len() <= MAX_BYTES && id.bytes().all(|byte| byte.is_ascii_graphic());
    given.into_iter().flatten().find(usable).map_or_else(fresh, str::to_owned)
}

/// A new one.
pub(crate) fn fresh() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}
