"""Words by which an answer is given, by what they do in a sentence and by language.

In an entry `_` is a space, and `*` at its end stands for any further letters. A language is added
by a line in each role; nothing else knows of languages.
"""

from __future__ import annotations

# What the letter or word that follows is: "the answer", "Réponse", "答案".
ANSWER = """
en answer answers ans answer's
zh 答案 正确答案 参考答案 最佳答案
ja 答え 答 解答 回答 正解 正答
fr réponse réponses
es respuesta respuestas
ru ответ* правильный_ответ
ar الإجابة الاجابة إجابة اجابة الجواب جواب والإجابة الإجابات إجابتي
hi उत्तर जवाब
de antwort antworten lösung
pt resposta respostas a_resposta a_minha_resposta
it risposta risposte
ko 정답 답
vi đáp_án
"""
# A verb of choosing; what is chosen follows, or stands before it in Japanese and Hindi.
CHOOSE = """
en choose chose pick select go_with going_with opt_for vote_for choosing picked selected
en leaves leaving left_with would_say i'd_say i_say would_answer i'd_answer i_answer chosen
en leaning_towards leaning_toward lean_towards lean_toward
zh 只剩 剩下 选 选择 应选 故选 本题选 应选择 答案选
ja 選ぶ 選びます 選択します 選択する 残る 残ります
fr choisis choisirais choisir opte_pour choisissez sélectionne j'opte_pour reste
es elijo escojo elegiría me_quedo_con marco elegir elija elige escoger escoja marque escogería queda
ru выбираю выберу выбрал выбрать выбирать выберите выбирайте выбрала выбрал_бы остаётся остается
ar أختار اختار سأختار اخترت أختر اختر تختر
hi चुनता चुनती चुनूंगा चुनूंगी चुनें
de wähle wählen wählt wählte nehme bleibt tippe_auf entscheide_mich_für
pt escolho escolha escolheria escolher fico_com opto_por opto_pela
it scelgo scegli scegliere sceglierei
ko 선택합니다 선택하겠습니다 선택한다 고릅니다 고르겠습니다 고른다
vi chọn
"""
# What a letter is called.
OPTION = """
en option options choice choices letter alternative statement item option_number choice_number
zh 选项 项 选项为
ja 選択肢 肢
fr option options proposition propositions lettre choix l'option affirmation
es opción opciones letra alternativa inciso literal afirmación
ru вариант* пункт* буква букву буквой под_буквой утверждени*
ar الخيار الاختيار الحرف خيار البديل والخيار
hi विकल्प
de option buchstabe aussage
pt opção letra alternativa
pt a_opção a_alternativa a_letra opções alternativas as_opções as_alternativas
it opzione lettera
ko 선택지 보기
"""
RIGHT = """
en correct right best accurate true the_most_likely the_most_appropriate the_most_suitable
en the_most_probable seems_most_likely appears_most_likely seems_most_appropriate more_likely
en the_better_choice the_better_option the_better_answer
zh 正确 正确的 对 最佳 最合适 符合题意 是对的 最恰当 最可能 最为恰当 最为合适 更合适 更恰当
ja 正しい 正しいです 適切 最も適切 正しいの 適切なの
fr correct correcte correctes juste justes exacte exactes bonne bonnes vrai vraie vrais vraies
fr le_plus_probable la_plus_probable le_plus_approprié la_plus_appropriée
es correcta correctas correcto correctos acertada cierta verdadera adecuada más_probable
ru правильн* верн* верен подходит
ar صحيح صحيحة الصحيح الصحيحة الصواب صائب الأصح
hi सही
de richtig richtige korrekt wahr wahrscheinlichste am_wahrscheinlichsten trifft_zu treffen_zu
pt correta correto certa corretas corretos a_correta a_certa a_opção_correta a_alternativa_correta
pt mais_provável mais_adequada mais_adequado
it corretta corretto giusta più_probabile
ko 맞다 맞습니다 옳다
vi đúng
"""
WRONG = """
en wrong incorrect false inaccurate ruled_out excluded eliminated implausible unlikely
zh 错误 错误的 错 不正确 不对 不符合 不符 不符合题意 排除 有误
ja 誤り 誤って 間違い 間違って 不適切 正しくない 正しくありません 誤答
fr faux fausse fausses incorrecte incorrectes incorrect éliminée éliminées exclue exclues
fr erronée erronées
es incorrecta incorrectas incorrecto falsa falsas falso descartada descartadas errónea
es incorrectos falsos erróneas
ru неверн* неправильн* ошибочн* исключ*
ar خطأ خاطئ خاطئة غير_صحيح غير_صحيحة مستبعد مستبعدة
hi गलत ग़लत
de falsch falsche inkorrekt unzutreffend ausgeschlossen trifft_nicht_zu treffen_nicht_zu
de scheidet_aus scheiden_aus
pt errada incorreta falsa
pt erradas errado errados incorretas incorreto incorretos falsas falso falsos
it errata sbagliata errate errato errati sbagliate sbagliato sbagliati false falso
ko 틀렸습니다 틀렸다 틀립니다 틀리다 틀린 오답
vi sai không_đúng
"""
# Takes away what follows.
NOT = """
en not isn't aren't wasn't can't cannot couldn't shouldn't wouldn't neither nor never none_of
en rather_than instead_of rule_out rules_out ruling_out exclude excludes eliminate eliminates except
en don't doesn't didn't won't not_recommend not_advise not_suggest not_want_to not_like_to
zh 不是 并非 非 不选 不应选 不能选 不为 而非 而不是 不应为 不会是 不可能是
zh 不要 别选 不能 不可 不会 不应 不应该 不该 不选择 不建议 不推荐 没有 没选 切勿 请勿
fr pas n'est_pas ne_sont_pas ni plutôt_que au_lieu_de non
es no ni en_lugar_de nunca no_recomiendo no_recomendaría
ru не ни вместо нельзя нет
ar ليس ليست لا وليس وليست بدلا_من لن لم
hi न मत
de nicht kein keine nein weder
pt não nem não_recomendo nunca
it non né
vi không đừng không_phải không_nên
"""
# Takes away what stands before it.
NOT_AFTER = """
ja ではなく じゃなく でなく ではない ではありません ではなくて は違う は違います
ja 選ばない 選ばないで 選びません 選ばず 選択しない 選択しません
hi नहीं नही
de nicht_zu
ko 아니라 아니고 아닙니다 아니다 아닌 선택하지 고르지
"""
BUT = """
en but yet rather instead
zh 而是 而 但是 但 应是 应该是
fr mais
es sino pero
ru а но
ar بل لكن ولكن وإنما إنما
hi बल्कि लेकिन
de sondern
pt mas
it ma bensì
"""
# A conclusion follows.
SO = """
en so thus therefore hence consequently ultimately finally overall accordingly conclusion
en in_summary in_short by_elimination
zh 因此 所以 故 综上 综上所述 由此可见 可见 总之 于是 故而
ja よって したがって 従って だから ゆえに 以上より そのため つまり
fr donc ainsi par_conséquent finalement
es por_lo_tanto por_tanto así_que entonces por_eso luego finalmente
ru значит следовательно поэтому таким_образом итак
ar لذلك إذن إذا وبالتالي لذا وعليه
hi इसलिए अतः अत:
de also daher somit demnach folglich
pt portanto logo
it quindi dunque
ko 따라서 그러므로
"""
AND = """
en and plus
zh 和 与 及 以及 跟
ja と および
fr et
es y e
ru и
ar و
hi और तथा एवं
de und noch
ko 와 과
vi và
"""
OR = """
en or and/or either between whether
zh 或 或者 还是 介于 也可能是 也可能 也许是
ja または もしくは か それとも
fr ou soit
es o u entre
ru или либо между
ar أو او إما بين
hi या अथवा
de oder entweder
pt ou
it o oppure
ko 또는
vi hoặc
"""
# Links "the answer" and what it is.
COPULA = """
en is are be was were being would will should must may might could can has it's that's equals
en seems appears looks
zh 为 是 应为 应该是 应该为 应 应该 则为 即 就是 可能是 应当是 只能是
ja は が も のは
fr est c'est sont serait sera c'est doit être peut
es es son sería será ser debe debería puede está están
ru это является являются будет есть должен быть
ar هي هو هما تكون يكون ستكون
hi है हैं होगा होगी था होना हो
de ist lautet sind wäre trifft treffen
pt é são seria está estão
it è sono sarebbe
ko 은 는 이 가
vi là
"""
# May stand between the others, or before or after an answer, and says nothing.
FILLER = """
en the most likely probably possibly clearly definitely certainly obviously both indeed also then
en only simply just my our your final here i think believe one
en i'd i'm i'll we'd perhaps surely of hopefully really actually exactly
en all follows as_follows think_that believe_that i_am sure confident yes okay ok well now
zh 最 可能 就 该 应当 本题 这道题 此题 的 我 认为 我认为 最终 题 只有 一定 显然 也 都
zh 了 吧 呢 中 其中 首先 各 均 皆 以上 因而 这里
ja の を です だ である でしょう となる となります になります 最も だけ のみ で に ます
ja 思います と思います
ja と考えられます と考えます 最終的な 私の
fr la le les l' une un plutôt probablement finale ma votre je pense que bien il s'agit de
es la el los las un una mi final probablemente más probable creo que
ru самый самая наиболее вероятно окончательный мой думаю что я скорее всего
ar النهائية النهائي هنا الأرجح أن فإن أعتقد الأكثر احتمالا
hi यह का की के ही अंतिम मेरा मैं मुझे लगता कि हूँ हूं को
de die der das wahrscheinlich ich würde am_ehesten auch ebenfalls
pt a_letra provavelmente
it la_lettera
ko 입니다 이다 번 를 을 모두 저는 나는
vi tôi đều
"""
# An article where a choice follows ("é a C"), else a word like others ("a priori").
ARTICLE = """
pt a
"""
# A reason or a remark begins: an answer may stand before it.
TAIL = """
en because because_of since as for due given in on with by from which who where when if unless
en although though while whereas this that it there they he she we you these those alone
en however based according
en corresponds describes refers states represents shows over depending
zh 因为 因 由于 理由 原因 解析 这 其 它 他 她
ja から ため ので 理由 なぜなら
fr car parce puisque en_effet qui selon en_fonction
es porque ya_que pues dado según que
ru потому поскольку так_как ибо который в_зависимости
ar لأن لأنه لأنها حيث وذلك
hi क्योंकि चूंकि कारण
de weil da denn zu je_nach abhängig
pt porque pois
it perché poiché
ko 왜냐하면
"""
# Nothing of the above, though a part of it is.
OTHER = """
en all_of_the_above none_of_the_above no_one not_only so_called so_far as_well so_that
en more_likely_to
zh 是不是 对不对 选题 选取 选用 对于 对比 应用 正确性 是否 非常 除非 而且 因素 项目 所有 与否
ja はい いいえ
"""

# "Yes" and "no", which judge a choice after its colon: "Option B: yes".
YES = frozenset(
    ["yes", "oui", "sí", "да", "ja", "sim", "sì", "是", "نعم", "हाँ", "हां", "はい", "네"]
)
NO = frozenset(["no", "non", "нет", "nein", "não", "否", "لا", "नहीं", "いいえ", "아니요"])

# What is said with one of the first and one of the second in a sentence is supposed: "If she were
# well, the answer would be C".
IF = frozenset(["if", "unless", "si", "wenn", "se", "если"])
WOULD = frozenset(["would", "serait", "sería", "wäre", "würde", "seria", "sarebbe", "бы"])

# What is said with one of these is said of all the choices before it: "A, C are right".
PLURAL = frozenset(
    ["are", "both", "sont", "son", "sind", "treffen", "são", "sono", "均", "都", "皆", "являются"]
)

# What follows corrects what was said: "Actually, it is C".
CORRECTING = frozenset(["actually", "correction", "wait"])

# Letters that people write in other alphabets, where the options are A, B, C, …
LETTER_NAMES = {
    **dict(zip("АВСЕНІЈ", "ABCEHIJ", strict=True)),  # look alike
    **dict(zip(("أ", "ب", "ج", "د", "هـ"), "ABCDE", strict=True)),
    **dict(zip("कखगघ", "ABCD", strict=True)),
    **dict(zip(("ए", "बी", "सी", "डी", "ई"), "ABCDE", strict=True)),
}
# The same for a text that writes Б, Г or Д: it counts in the Cyrillic order.
CYRILLIC_ORDER = dict(zip("АБВГД", "ABCDE", strict=True))

# After "E." or "C.", these name a species and not an answer.
_SPECIES = """
coli difficile diff aureus albicans pneumoniae faecalis faecium cereus anthracis
botulinum tetani perfringens trachomatis psittaci jejuni fetus neoformans gattii
burgdorferi pertussis fragilis parapertussis henselae quintana abortus melitensis
subtilis baumannii fumigatus niger flavus histolytica cloacae aerogenes diphtheriae
immitis dermatitidis burnetii granulosus multilocularis vermicularis duodenale
lumbricoides israelii hydrophila auris glabrata krusei tropicalis parapsilosis corrodens
rhusiopathiae
"""
SPECIES = frozenset(_SPECIES.split())
