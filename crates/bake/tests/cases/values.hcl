variable "NAMES" {
  type    = list(string)
  default = ["b", "a"]
}
variable "PORTS" {
  type    = map(number)
  default = { http = 80, https = "443" }
}
variable "SETTINGS" {
  type    = object({ debug = bool, level = number })
  default = { debug = true, level = 3 }
}
variable "EMPTY" {}
variable "HALF" {
  default = 7 / 2
}
variable "NOTHING" {
  default = null
}

answer = 6 * 7

target "default" {
  args = {
    sorted   = join(",", sort(NAMES))
    port     = PORTS.https + 1
    debug    = SETTINGS.debug
    level    = SETTINGS["level"]
    empty    = "[${EMPTY}]"
    half     = HALF
    nothing  = NOTHING == null ? "null" : "some"
    answer   = answer
    splat    = jsonencode([{ a = 1 }, { a = "2" }][*].a)
    legacy   = jsonencode([{ a = { b = 1 } }].*.a.b)
    nested   = { x = { y = ["z"] } }.x.y[0]
    math     = (1 + 2) * 3 - 10 / 4 % 2
    compare  = 1 < 2 && !(2 >= 3) || false
    equal    = "${1 == "1"} ${[1] == [1]} ${{ a = 1 } == { a = 1 }}"
    fallback = try(PORTS.ftp, "none")
    escaped  = "$${x} %%{y} \"q\" \u00e9\t|"
    heredoc  = <<EOT
one
  ${upper("two")}
EOT
    stripped = "a ${~ "b" ~} c"
    grouped  = jsonencode({ for n in ["ab", "ac", "b"] : substr(n, 0, 1) => n... })
    when     = formatdate("YYYY-MM-DD", timeadd("2020-02-28T00:00:00Z", "48h"))
  }
}
